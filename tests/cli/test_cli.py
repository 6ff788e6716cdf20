"""The command line: one clear message for each mistake, light imports, and JSON output."""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from support import call, copied, finish, flags, start, trained
from typer.main import get_command

from sitkit.cli import console
from sitkit.cli.commands import app
from sitkit.registry import registries
from sitkit.results.study_results import FILE as RESULTS
from sitkit.results.study_results import find_study
from sitkit.runs.checkpoint import checkpoints
from sitkit.runtime.files import write_file
from sitkit.runtime.progress import Event
from sitkit.studies.study_file import read_study


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty directory, and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "component": (["train", "--interp", "linaer"], ["--interp", "linaer", "'linear'"]),
    "target": (["train", "--target", "veloctiy"], ["veloctiy", "'velocity'"]),
    "backbone preset": (["train", "--backbone", "sit-xl/3"], ["sit-xl/3", "sit-xl/2"]),
    "key": (["train", "--set", "train.lrr=1"], ["train.lrr", "'lr'"]),
    "top key": (["train", "--set", "trian.lr=1"], ["trian", "'train'"]),
    "component field": (["train", "--set", "backbone.widht=1"], ["widht", "Its fields"]),
    "no pair": (["train", "--set", "train.lr"], ["key=value"]),
    "negative steps": (["train", "--steps", "-3"], ["--steps", "train.steps", "-3"]),
    "word for a number": (["train", "--set", "train.lr=fast"], ["train.lr", "'fast'"]),
    "preset": (["train", "digist"], ["digist", "'digits'"]),
    "file": (["train", "digist.yaml"], ["digist.yaml"]),
    "study": (["ablate", "tabel6.yaml"], ["tabel6.yaml"]),
    "no run": (["sample", "latest"], ["no runs", "sitkit train"]),
    "missing folder": (
        ["train", "--data", "image-folder", "--set", "data.path=nowhere", "--set", "data.size=8"],
        ["nowhere"],
    ),
    "missing npz": (["train", "--data", "npz", "--set", "data.path=nowhere.npz"], ["nowhere.npz"]),
    "field without default": (["train", "--data", "npz"], ["path"]),
    "patch that does not fit": (["train", "--set", "backbone.patch_size=3", "--set", "run.track=false"], ["3", "8"]),
    "device": (["train", "--device", "cudda"], ["cudda"]),
    "registry": (["list", "interpolant_s"], ["'interpolants'"]),
    "shown component": (["show", "interpolant", "gpv"], ["'gvp'"]),
    "sampler field": (["show", "sampler", "heun", "--set", "steps=-1"], ["steps", "-1"]),
}


@pytest.mark.parametrize(("words", "texts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(words: list[str], texts: list[str], here: Path) -> None:
    called = call(*words)
    assert called.status == 2, called
    assert called.err.count("error:") == 1 and "Traceback" not in called.err
    for text in texts:
        assert text in called.err, called.err
    assert not list(here.glob("runs/*/checkpoints")), "refused before any work"


COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "ablate",
    "likelihood",
    "losscurve",
    "search",
    "certify",
    "list",
    "show",
    "runs",
)


def test_unknown_flag_and_command_are_usage_errors(here: Path) -> None:
    assert call("train", "--intrep", "gvp").status == 2
    assert call("trian").status == 2


@pytest.fixture
def run(here: Path) -> Path:
    """Return a copy of a trained run in the current directory."""
    return copied(trained(), here)


def run_mistake(here: Path, *words: str) -> str:
    """Return the error message of a command that cannot succeed on the runs of a folder."""
    called = call(*words, "--runs", str(here))
    assert called.status == 2, called
    assert called.err.count("error:") == 1 and "Traceback" not in called.err
    return called.err


def test_a_misspelt_run(here: Path, run: Path) -> None:
    assert run.name in run_mistake(here, "sample", run.name[:-2] + "xx")


def test_a_truncated_checkpoint(here: Path, run: Path) -> None:
    for path in checkpoints(run / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-100])
    message = run_mistake(here, "sample", run.name)
    assert "damaged or cut short" in message and "step-00000040" in message and "warning" not in message


def test_a_pickle_as_a_checkpoint(here: Path, run: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(here / "owned"),)  # pyright: ignore[reportReturnType]

    (path,) = checkpoints(run / "checkpoints")
    path.write_bytes(pickle.dumps(Evil()))
    # By the name of its run, and as the file itself.
    assert "is a pickle" in run_mistake(here, "sample", run.name)
    assert "is a pickle" in run_mistake(here, "evaluate", str(path))
    assert not (here / "owned").exists()


def test_a_setting_that_the_training_fixed(here: Path, run: Path) -> None:
    for command in ("sample", "evaluate"):
        message = run_mistake(here, command, run.name, "--set", "target=score")
        assert "--set target=score: target was fixed when" in message
    assert not (run / "samples").exists()


EVALUATE_MISTAKES = {
    "--metric frechett": "--metric: No metric named 'frechett'. Did you mean 'frechet'?",
    "--metric frechet,prec": "--metric: No metric named 'prec'. Did you mean 'precision'?",
    "--features incept": "--features: No extractor named 'incept'. Did you mean 'inception'?",
    "--sampler hoin": "--sampler: No sampler named 'hoin'. Did you mean 'heun'?",
    "--set guidance=cgf": "--set guidance=cgf: No guidance named 'cgf'. Did you mean 'cfg'?",
    "--set sample.n=0": "--set sample.n=0: should be greater than or equal to 1; got 0.",
}


@pytest.mark.parametrize("words", EVALUATE_MISTAKES)
def test_a_mistake_on_the_command_line_is_reported_once_with_its_flag(words: str) -> None:
    called = call("evaluate", trained(), *words.split())
    assert called.status == 2 and called.err.count("error:") == 1
    assert f"error: {EVALUATE_MISTAKES[words]}" in called.err


def test_no_experiments_are_a_line_and_not_an_empty_table() -> None:
    called = call("list", "experiments")
    assert called.status == 0 and called.out.startswith("no experiments: ") and called.out.count("\n") == 1
    assert json.loads(call("list", "experiments", "--json").out) == {"experiments": []}
    refused = call("list", "experimentz")
    assert refused.status == 2 and "No registry 'experimentz'. Did you mean 'experiments'?" in refused.err


def test_no_step_leaves_a_network_that_can_be_sampled(here: Path) -> None:
    words = flags("train.steps=0")
    assert call("train", "points", *words).status == 0
    assert call("train", "points", *words).status == 0
    sampled = call("sample", "-n", "5", "--steps", "2")
    assert sampled.status == 0 and "5 at 4 evaluations" in sampled.out
    refused = call("train", "points", *words, "--set", "train.posthoc=[0.05]")
    assert refused.status == 2 and "posthoc averages what a training makes, and steps is 0" in refused.err


@pytest.mark.parametrize("width", [50, 80, 120])
def test_a_run_is_a_line_at_any_width(width: int, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied(trained(), here / "runs")
    assert call("evaluate", "-n", "20", "--steps", "2").status == 0
    # In a pipe nothing is cut.
    whole = call("runs").out.splitlines()
    assert len(whole) == 3 and whole[2].split(" │ ")[2].strip().endswith(
        " sliced-wasserstein; 1 samplings; 1 evaluations"
    )
    screen = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=screen, width=width, force_terminal=True, no_color=True))
    call("runs")
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3 and all(len(Text.from_ansi(line)) <= width for line in lines)
    assert f" {run.name} " in lines[2] and " 40/40 " in lines[2]


def test_a_mistake_in_a_file_names_its_line(here: Path) -> None:
    (here / "mine.yaml").write_text("data: digits\ntrain:\n  steps: 1\n  stepz: 2\n")
    called = call("train", "mine.yaml")
    assert called.status == 2 and "error: mine.yaml:4: unknown key 'train.stepz'. Did you mean 'steps'?" in called.err
    (here / "study.yaml").write_text("base: points\nrows:\n  - {interp: gpv}\n")
    called = call("ablate", "study.yaml")
    assert called.status == 2 and "error: study.yaml:3: " in called.err and called.err.count("error:") == 1
    called = call("ablate", "study.yaml", "--base", "pionts")
    assert called.status == 2 and "error: --base: " in called.err and "'points'" in called.err
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml", "study.yaml"]


def test_mistakes_in_a_process_of_its_own(here: Path) -> None:
    run = copied(trained(), here / "runs")
    (path,) = checkpoints(run / "checkpoints")
    path.write_bytes(path.read_bytes()[:-1])
    for words, message in ((("sample", run.name), "damaged or cut short"), (("train", "--data", "npz"), "path")):
        called = finish(start(*words, cwd=here))
        assert called.status == 2 and message in called.err and called.out == "", called
        assert called.err.count("error:") == 1 and "Traceback" not in called.err


def test_flags_and_files_say_the_same(here: Path) -> None:
    """A setting by flag, by --set or in a file gives the same run, which the next command finds complete."""
    words = flags("train.steps=8")
    assert call("train", "points", *words, "--interp", "gvp", "--seed", "3").status == 0
    weights = {path: path.stat().st_mtime_ns for path in here.rglob("*.safetensors")}
    assert len(weights) == 1
    assert call("train", "points", *words, "--set", "interp=gvp", "--set", "train.seed=3").status == 0
    (run,) = (here / "runs").iterdir()
    again = call("train", run / "config.yaml")
    assert again.status == 0 and "continuing" in again.err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*.safetensors")} == weights


def test_a_flag_and_a_set_are_both_used(here: Path, run: Path) -> None:
    called = call("sample", run.name, "--runs", here, "--steps", "3", "--set", "sampler=euler", "-n", "5")
    assert called.status == 0 and "5 at 3 evaluations" in called.out


def test_the_chosen_weights_are_used(here: Path, run: Path) -> None:
    for weights in ("ema", "raw"):
        words = ("-n", "5", "--steps", "3", "--set", f"sample.weights={weights}")
        assert call("sample", run.name, "--runs", here, *words).status == 0
    made = [path.read_bytes() for path in run.glob("samples/*/samples.npz")]
    assert len(made) == 2 and made[0] != made[1]


def test_an_ode_sampler_refuses_a_diffusion(here: Path, run: Path) -> None:
    assert "euler-maruyama" in run_mistake(here, "sample", run.name, "--sampler", "heun", "--diffusion", "kl")


def test_a_sampler_with_a_singular_last_step_is_refused(here: Path, run: Path) -> None:
    words = ["sample", run.name, "--sampler", "euler-maruyama", "--diffusion", "constant"]
    assert "last_step" in run_mistake(here, *words)
    assert not (run / "samples").exists()


def test_train_sample_evaluate(here: Path) -> None:
    called = call("train", "points", *flags())
    assert called.status == 0, called.err
    assert "sitkit sample" in called.out
    sampled = call("sample", "-n", "50", "--sampler", "euler-maruyama", "--diffusion", "sigma", "--steps", "20")
    assert sampled.status == 0, sampled.err
    assert "20 evaluations" in sampled.out and list(here.glob("runs/*/samples/*/grid.png"))
    measured = call("evaluate", "-n", "50", "--steps", "4", "--json")
    assert measured.status == 0, measured.err
    (record,) = json.loads(measured.out)
    assert record["n"] == 50 and record["sampling"]["nfe"] == 8 and record["metric"]["name"] == "sliced-wasserstein"
    listed = json.loads(call("runs", "--json").out)
    assert [run["step"] for run in listed] == [40] and listed[0]["evaluations"] == 1


@pytest.mark.parametrize("plural", registries)
def test_list_names_everything(plural: str) -> None:
    called = call("list", plural, "--json")
    entries = json.loads(called.out)[plural]
    assert [entry["name"] for entry in entries] == registries[plural].names()
    assert all(entry["meaning"] for entry in entries), "every component has a line that says what it is"


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("interpolant", "gvp", "Source: SiT section 2.2"),
        ("diffusion", "sin2", "SiT Table 6"),
        ("timestep", "shift", "3.0"),
    ],
)
def test_show_draws(kind: str, name: str, says: str, here: Path) -> None:
    called = call("show", kind, name)
    assert called.status == 0, called.err
    assert (here / f"{kind}-{name}.png").stat().st_size > 5_000
    assert says in called.out


def test_help_and_list_import_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "numpy", "mlflow", "optuna", "sklearn", "matplotlib", "torchsde", "torchdiffeq")
    for words in (["--help"], ["train", "--help"], ["list"]):
        code = (
            f"import sys; sys.argv = ['sitkit', *{words!r}]\n"
            "from sitkit.cli import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            f"print('HEAVY', [name for name in {heavy!r} if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "SITKIT_PLUGINS": ""},
            check=True,
        )
        assert "HEAVY []" in done.stdout, done.stdout[-300:]


def test_every_command_explains_itself(here: Path) -> None:
    bare = call()
    shown = call("--help")
    assert shown.status == 0 and "Traceback" not in bare.err
    for command in COMMANDS:
        called = call(command, "--help")
        assert called.status == 0 and f"sitkit {command}" in called.out and command in shown.out
        assert len(called.out) > 400 and called.err == ""
    assert list(here.iterdir()) == []


def test_show_and_runs_as_json(here: Path) -> None:
    shown = json.loads(call("show", "sampler", "heun", "--set", "steps=7", "--json").out)
    assert shown["name"] == "heun" and shown["fields"]["steps"] == 7 and "Order 2" in shown["doc"]
    assert json.loads(call("show", "data", "npz", "--json").out)["fields"] is None  # it needs a path
    assert call("runs").out.startswith("no runs in runs") and json.loads(call("runs", "--json").out) == []
    copied(trained(), here / "runs")
    (run,) = json.loads(call("runs", "--json").out)
    assert (run["step"], run["of"], run["samplings"], run["evaluations"]) == (40, 40, 0, 0)
    assert trained().name[:20] in call("runs").out
    assert set(json.loads(call("list", "--json").out)) == {*registries, "presets", "experiments"}


def test_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "sitkit", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("sitkit ")
    done = subprocess.run(
        [sys.executable, "-m", "sitkit", "train", "--interp", "linaer"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "linear" in done.stderr and "Traceback" not in done.stderr


def test_a_preset_of_the_run_sets_the_sampler(here: Path, run: Path) -> None:
    write_file(run / "presets" / "fast.yaml", "sampler: {name: euler, steps: 3}\ndiffusion: zero\n")
    called = call("sample", run.name, "--preset", "fast", "-n", "10", "--runs", str(here))
    assert called.status == 0 and "3 evaluations" in called.out, called
    assert "'fast'" in run_mistake(here, "sample", run.name, "--preset", "fats")


WRITE_ALONE = {"train", "convert"}


def test_every_command_that_prints_a_result_prints_it_as_json_too() -> None:
    def leaves(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        inner = getattr(command, "commands", {})
        if not inner:
            yield name, {flag for parameter in command.params for flag in parameter.opts}
        for word, sub in inner.items():
            yield from leaves(sub, f"{name} {word}".strip())

    without = {name for name, flags in leaves(get_command(app), "") if "--json" not in flags}
    assert without <= WRITE_ALONE, without


def test_a_study_with_a_name_that_windows_refuses_has_a_folder_that_it_takes(tmp_path: Path) -> None:
    file = tmp_path / 'what is "best"?.yaml'
    file.write_text("base: digits\nrows: [{label: a}]\n")
    plan = read_study(file, base="points")
    assert plan.name == "what is -best---points"
    write_file(tmp_path / "studies" / "what is -best--" / RESULTS, "{}")
    assert find_study(file, tmp_path / "runs") == tmp_path / "studies" / "what is -best--"


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """rich replaces :ok: by an emoji and reads [bold] as a style; in a name both are printed unchanged."""
    console.say("study:ok:0 [bold]")
    console.table(("[red]", ":ok:"), [("a:ok:b", "[x]")], title=":ok:", notes=["[dim]:ok:"])
    console.error("row ':ok:' [bold]")
    printed = capsys.readouterr()
    assert printed.out.count(":ok:") == 5 and all(text in printed.out for text in ("[bold]", "[red]", "[x]"))
    assert printed.err == "error: row ':ok:' [bold]\n"


def test_a_narrow_table_cuts_no_name(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns too, a cell holds its whole text, so that it can be copied."""
    monkeypatch.setattr(console, "out", Console(width=80, file=sys.stdout))
    name = "digits-linear-velocity-sit-4727d08723ec"
    console.table(("run", "command", "why"), [(name, "pip install 'sitkit[inception]'", "word " * 20)])
    printed = capsys.readouterr().out
    cells = ["".join(line.split("\u2502")[column].strip() for line in printed.splitlines()[2:]) for column in (0, 1)]
    assert "\u2026" not in printed and cells[0] == name and cells[1].replace(" ", "") == "pipinstall'sitkit[inception]'"


def test_a_path_is_one_line_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "out", Console(width=30, file=sys.stdout))
    line = f"pictures  runs/{'digits-linear-velocity-sit-4727d08723ec/' * 2}previews/step-00000800.png"
    console.say(line)
    assert capsys.readouterr().out == line + "\n"


def test_a_bar_at_80_columns_cuts_no_count_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "err", Console(width=80, file=file, force_terminal=True, color_system=None))
    with console.progress() as report:
        report(Event("train", 0, 400_000))
        values = {"loss": 0.4332, "images/s": 328.6, "mfu": 0.1714, "GiB": 71.2}
        report(Event("train", 123_456, 400_000, values))
    last = file.getvalue().rpartition("train")[2]
    assert "\u2026" not in last and "123456/400000" in last and "0:00:00 left -:--:--" in last and "71.2" in last


def test_the_command_that_comes_next_can_be_pasted(here: Path) -> None:
    """A folder whose name holds a space is quoted."""
    runs = here / "my runs"
    printed = call("train", "points", "--steps", "1", "--runs", str(runs), "--set", "run.track=false").out
    words = shlex.split(printed.partition("next ")[2].partition("|")[0])
    assert words[:2] == ["sitkit", "sample"] and len(words) == 3 and Path(words[2]).parent == runs


def test_a_missing_file_is_not_reported_as_a_misspelt_run(here: Path) -> None:
    assert "There is no file my net.safetensors." in run_mistake(here, "sample", "my net.safetensors")


def test_a_folder_that_cannot_be_made_is_one_line_of_error(here: Path) -> None:
    (here / "file").touch()
    called = call("train", "points", *flags(), "--runs", "file/runs")
    assert called.status == 1 and called.err.endswith(": Not a directory.\n") and "Traceback" not in called.err


def test_a_file_says_where_its_run_goes_and_the_flag_is_stronger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text(
        "run: {folder: here, track: false}\ntrain: {steps: 1, batch: 8}\ndata: points\nbackbone: mlp\n"
    )
    assert call("train", "f.yaml").status == 0
    (run,) = Path("here").iterdir()
    assert not Path("runs").exists()
    again = call("train", run / "config.yaml", "--set", "train.steps=1")
    assert again.status == 0 and [*Path("here").iterdir()] == [run] and not Path("runs").exists(), again.err
    assert call("train", "f.yaml", "--runs", "there").status == 0 and (Path("there") / run.name).is_dir()
    assert call("train", "f.yaml", "--set", "run.folder=third").status == 0 and (Path("third") / run.name).is_dir()
