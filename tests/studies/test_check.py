"""The forecast of a study, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import BASE, STUDY, call, run_study, tiny, trained, write_study

import sitkit
from sitkit.runs import checkpoint
from sitkit.runs.config.sources import assemble, read_assignments, read_config
from sitkit.studies.check import check_plan, read_plan
from sitkit.studies.cost import cost_of, network_cost, peak_bytes
from sitkit.studies.study_file import read_study

SHAPE = (1, 8, 8)


def checked(folder: Path, study: str = STUDY, base: str = BASE):
    path = write_study(folder, study, base)
    return check_plan(read_plan(str(path), settings=read_assignments([f"run.folder={folder / 'runs'}"])))


def test_the_peak_counts_the_tensors_that_live_at_the_same_time() -> None:
    """Of ten tensors made in turn two live at the same time; views and operations in place take no memory."""
    each = 4 * 1000

    def chain() -> None:
        x = torch.zeros(1000)
        for _ in range(10):
            x = x + 1
        x.view(10, 100).mul_(2)

    assert peak_bytes(chain) == 2 * each
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(10)]) == 10 * each


def test_the_forecast_of_memory_is_that_of_the_real_network() -> None:
    """Shapes without values give the peak of the same steps with values, but for attention, whose kernels differ."""
    backbone = sitkit.backbones.create("mlp", hidden_size=32, depth=2)
    cost = network_cost(backbone, (2,), 0)
    network = backbone.build((2,), 0).train()

    def evaluate(n: int) -> torch.Tensor:
        return network(torch.zeros(n, 2), torch.zeros(n), torch.zeros(n, dtype=torch.int64))

    def learn(n: int) -> int:
        network.zero_grad(set_to_none=True)
        return peak_bytes(lambda: evaluate(n).square().mean().backward())

    @torch.no_grad()
    def draw(n: int) -> int:
        return peak_bytes(lambda: evaluate(n))

    assert cost.parameters == sum(p.numel() for p in network.parameters())
    assert cost.learning == (learn(8) - learn(4)) // 4 and cost.drawing == (draw(8) - draw(4)) // 4
    # A product of (n, i) and (i, o) takes 2 n i o: the only operations that are counted.
    weights = sum(p.numel() for name, p in network.named_parameters() if p.ndim == 2 and "embedding" not in name)
    assert cost.flops is not None and cost.flops <= 2 * weights


def test_the_operations_of_the_transformer_are_those_of_the_paper() -> None:
    """SiT-XL/2 at 32 x 32 x 4: 118.6 G multiply-adds and 675 M parameters (Table 9: the sizes of DiT)."""
    cost = network_cost(sitkit.backbones.create("sit-xl/2"), (4, 32, 32), 1000)
    assert cost.flops == pytest.approx(2 * 118.6e9, rel=0.005) and cost.parameters == pytest.approx(675e6, rel=0.002)


def test_a_run_takes_as_much_disk_as_forecast(tmp_path: Path) -> None:
    folder = trained()
    cost = cost_of(tiny(folder.parent), nfe=100)
    size = sum(path.stat().st_size for path in checkpoint.checkpoints(folder / "checkpoints"))
    kept = len(checkpoint.checkpoints(folder / "checkpoints"))
    # The header says what the run is, in a few kB.
    assert cost.checkpoints * kept / 2 <= size <= cost.checkpoints * kept / 2 + kept * 16_000
    assert cost.flops is not None and cost.sampling_flops == cost.flops * 100 * 2000


def test_the_interval_cost_and_state_of_each_cell(tmp_path: Path) -> None:
    before = checked(tmp_path)
    assert [(cell.number, cell.row, cell.column, cell.nfe, cell.steps) for cell in before.cells] == [
        (1, "Linear", "3", 6, 3), (2, "Linear", "6", 12, 6), (3, "GVP", "3", 6, 3), (4, "GVP", "6", 12, 6),
    ]  # fmt: skip
    assert {cell.state for cell in before.cells} == {"todo"} and not before.refused
    assert before.trainings == (2, 2) and before.measurements == (4, 4) and before.disk > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"], "nothing is written"
    run_study(tmp_path / "study.yaml")
    after = checked(tmp_path)
    assert {cell.state for cell in after.cells} == {"measured"} and {cell.step for cell in after.cells} == {30}
    assert after.trainings == (2, 0) and after.measurements == (4, 0) and (after.flops, after.disk) == (0, 0)
    # One number is removed: that measurement is to do, from the existing training.
    results = json.loads((tmp_path / "studies/study/results.json").read_text())
    (tmp_path / "runs" / results["cells"][3]["evaluation"]).unlink()
    again = checked(tmp_path)
    assert [cell.state for cell in again.cells] == ["measured"] * 3 + ["trained"]
    assert again.trainings == (2, 0) and again.measurements == (4, 1)
    # A training that was stopped: the step of its checkpoint.
    checkpoint.checkpoints(tmp_path / "runs" / results["cells"][3]["run"] / "checkpoints")[-1].unlink()
    cut = checked(tmp_path).cells[3]
    assert (cut.state, cut.step) == ("begun", 25)


def test_singular_ends_have_a_reason(tmp_path: Path) -> None:
    """On linear alpha is t: w of kl has no limit at t = 0, so an SDE starts later, and says why."""
    study = STUDY.replace("sampler: heun", "sampler: {name: euler-maruyama, last_step: tweedie}, diffusion: kl")
    cells = checked(tmp_path, study.replace("[3, 6]", "[50]").replace('{"3": 1.5, "6": 2}', "1")).cells
    linear = cells[0]
    assert linear.times[0] > 0 and linear.times[1] == pytest.approx(1) and linear.nfe == 50 == linear.steps
    assert any("not finite at t = 0" in why for why in linear.singular)


@pytest.mark.parametrize("setting", ["diffusion: kl-eta", "sampler: {grid: adapted}"])
def test_a_component_that_needs_a_trained_run_does_not_stop_its_study(tmp_path: Path, setting: str) -> None:
    base = "{name: euler-maruyama, last_step: tweedie}" if "kl-eta" in setting else "heun"
    study = STUDY.replace("sampler: heun", f"sampler: {base}").replace("[3, 6]", "[50]")
    study = study.replace('{"3": 1.5, "6": 2}', "1").replace("label: GVP", f"label: GVP\n    {setting}")
    report = checked(tmp_path, study)
    assert not report.refused and len(report.cells) == 2


# A change of the base, and words of the refusal, which comes before any work.
REFUSED = [
    ("backbone: {name: mlp, hidden_size: 16, depth: 1}", "backbone: sit-xs/2", "not states of shape 2"),
    ("metric: sliced-wasserstein", "metric: {name: sfid, features: pixels}", "reads spatial"),
    ("n: 50", "n: 1", "at least 2 samples"),
    ("labels: none}", "labels: none}\nsampler: {name: heun, partial: true}", "leave sampler.partial unset"),
    ("{name: points, law: moons, size: 400}", "{name: npz, path: nothing.npz}", "nothing.npz"),
]


@pytest.mark.parametrize(("old", "new", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_cells_that_cannot_be_done_here_are_refused_with_their_line(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert BASE.count(old) == 1
    study = write_study(tmp_path, base=BASE.replace(old, new))
    result = call("check", study, "--runs", tmp_path / "runs")
    assert result.status == 2 and "Traceback" not in result.err
    (line,) = result.err.splitlines()
    assert f"{study}:6: row 'Linear', 3: " in line and words in line and "The same for 3 more of the cells." in line
    # And the study itself refuses before any work.
    result = call("ablate", study, "--runs", tmp_path / "runs")
    assert result.status == 2 and f"{study}:6: row 'Linear', 3: " in result.err and words in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "study.yaml"]


def test_an_impossible_cell_is_named_and_the_others_have_a_forecast(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY.replace("label: GVP", "label: GVP\n    diffusion: kl"))
    result = call("check", study, "--runs", tmp_path / "runs", "--json")
    assert result.status == 2 and f"{study}:7: row 'GVP', 3: sampler 'heun' solves the ODE" in result.err
    report = json.loads(result.out)
    assert [cell["row"] for cell in report["cells"]] == ["Linear"] * 2
    assert [cell["row"] for cell in report["refused"]] == ["GVP"] * 2


def test_a_configuration_is_a_study_of_one_cell(tmp_path: Path) -> None:
    result = call("check", "points", "--runs", tmp_path, "--json")
    (cell,) = json.loads(result.out)["cells"]
    assert result.status == 0 and cell["nfe"] == 100 and cell["cost"]["shape"] == [2] and cell["state"] == "todo"
    folder = trained()
    (cell,) = json.loads(call("check", folder, "--runs", folder.parent, "--json").out)["cells"]
    assert cell["run"] == folder.name and cell["state"] == "trained" and cell["step"] == 40
    text = call("check", "points", "--runs", tmp_path).out
    assert "to do: 1 of 1 trainings, 1 of 1 measurements" in text
    for words, said in (
        (("points", "--set", "diffusion=kl"), "--set diffusion=kl: sampler 'heun' solves the ODE"),
        (("points", "--seeds", "1"), "--seeds is for a study"),
        (("poinst",), "Did you mean 'points'?"),
        (("points", "--set", "backbone=sit-xs/2"), "points: backbone 'sit' takes images"),
    ):
        result = call("check", *words, "--runs", tmp_path)
        assert result.status == 2 and said in result.err, result.err


def test_the_study_does_what_the_check_says(tmp_path: Path) -> None:
    """The forecast evaluations are those of the records."""
    study = write_study(tmp_path)
    evaluations = {(cell.row, cell.column): cell.nfe for cell in checked(tmp_path).cells}
    outcome = run_study(study)
    assert {(cell.row, cell.column): cell.nfe for cell in outcome.results.cells} == evaluations
    assert [c.measurement for c in checked(tmp_path).cells] == [p.measurement for p in _places(study)]


def _places(study: Path):
    from sitkit.studies.tasks import locations_of

    return locations_of(cell.config for cell in read_study(study).cells)


@pytest.mark.parametrize(("n", "kept"), [(2**24, 2**30), (2**24 + 1, 0)])
def test_samples_that_an_evaluation_does_not_keep_take_no_disk(n: int, kept: int) -> None:
    config = assemble([read_config("digits"), read_assignments(["metric=frechet", f"sample.n={n}"])])
    assert cost_of(config, 1).samples == kept
