"""Files are whole or absent, checkpoints come back to the bit, and nothing is unpickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sitkit.runs.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
)
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import file_name, read_json, to_json, update_file, write_file, write_json
from sitkit.runtime.tensors import load_tensors, read_header, save_tensors

ADAMW: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def python(code: str, *args: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, stderr=subprocess.PIPE, **options)


# Files


DEVICES = st.sampled_from(["con", "NUL", "aux.txt", "Com1", "lpt9.tar.gz", "prn ", "conin$", "com¹"])
ODD = st.text(alphabet='<>:"/\\|?*. \x00\x1f\x7fabé1-', max_size=12)


@given(st.one_of(st.text(max_size=200), ODD, DEVICES, st.tuples(DEVICES, ODD).map("".join)))
def test_a_file_name_is_one_on_every_system(text: str) -> None:
    name = file_name(text)
    assert name and len(name) <= 121 and not set(name) & set('<>:"/\\|?*')
    assert not any(ord(c) < 32 for c in name) and name[-1] not in ". " and name not in (".", "..")
    assert not PureWindowsPath(name).is_reserved() and PureWindowsPath(name).name == name
    assert file_name(name) == name


@given(st.from_regex(r"[a-z0-9_ +@=é-]{1,40}[a-z0-9]", fullmatch=True))
def test_what_is_a_file_name_stays_as_it_is(text: str) -> None:
    assert file_name(text) == text or PureWindowsPath(text).is_reserved()


@pytest.mark.parametrize("data", [b"\x00\xff", "é\n", b""])
def test_written_data_come_back_and_nothing_else_is_left(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "new folder" / "file"
    for _ in range(2):
        write_file(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(path.parent.iterdir()) == [path]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writer = """if True:
        import sys
        from sitkit.runtime.files import write_file
        while True:
            for letter in "ab":
                write_file(sys.argv[1], letter * 3_000_000)
    """
    seen: set[str] = set()
    for pause in (0.0, 0.002, 0.005, 0.011, 0.017, 0.023):
        path.unlink(missing_ok=True)
        process = python(writer, str(path))
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        text = path.read_text()
        assert text == text[0] * 3_000_000
        seen.add(text[0])
    assert seen <= {"a", "b"}


@pytest.mark.skipif(os.name == "nt", reason="the bits of a file's mode are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_every_kind_of_file_may_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "text", "text")
        save_tensors(tmp_path / "tensors.safetensors", {"x": torch.zeros(2)}, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("kind", ["write", "save"])
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path, kind: str) -> None:
    """A limit on file size makes the operating system refuse the write half-way, as a full disk does."""
    path = tmp_path / "step-00000001.safetensors"
    save_tensors(path, {"w": torch.ones(3)}, {"step": 1})
    before = path.read_bytes()
    code = f"""if True:
        import resource, sys
        from sitkit.runtime import files, tensors
        from sitkit.runtime.errors import WorkFailed
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            if {kind!r} == "write":
                files.write_file(sys.argv[1], bytes(1_000_000))
            else:
                import torch
                tensors.save_tensors(sys.argv[1], {{"w": torch.ones(1_000_000)}}, {{}})
        except WorkFailed as error:
            assert sys.argv[1] in str(error), error
            sys.exit(7)
    """
    process = python(code, str(path))
    _, errors = process.communicate()
    assert process.returncode == 7, errors
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions of a group")
def test_whoever_may_read_the_folder_may_read_a_checkpoint(tmp_path: Path) -> None:
    write_file(tmp_path / "text", "x")
    save_tensors(tmp_path / "step-00000001.safetensors", {"w": torch.ones(3)}, {})
    plain, saved = ((tmp_path / name).stat().st_mode for name in ("text", "step-00000001.safetensors"))
    assert saved == plain


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkFailed, match=r"file/below could not be written"):
        write_file(tmp_path / "file" / "below", "x")


# JSON

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(plain)
def test_json_round_trip(value: Any) -> None:
    assert json.loads(to_json(value)) == value


def test_json_on_disk_keeps_its_order_and_spells_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": math.nan, "a": (math.inf, {"c": -math.inf})})
    assert path.read_text().endswith("}\n")
    back = read_json(path)
    assert list(back) == ["b", "a"]
    assert back == {"b": "NaN", "a": ["Infinity", {"c": "-Infinity"}]}
    assert math.isnan(float(back["b"])) and float(back["a"][0]) == math.inf and float(back["a"][1]["c"]) == -math.inf


@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "no file"), (b'{"a": 1,\n "b": }', r"a\.json:2"), (b"\xff\xfe", "UTF-8")],
)
def test_what_is_not_json_is_named_by_file_and_line(tmp_path: Path, data: bytes | None, says: str) -> None:
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


# Checkpoints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def sample_tensors() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {str(dtype): (base % 3).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 5), "other empty": torch.empty(0)}
    tensors |= {
        "strided": base.T,
        "tied": base,
        "part": base[1:3],
        "column": base[:, 2],
        "spread": base[:1].expand(3, 6),
    }
    return tensors | {"trained": torch.nn.Parameter(base)}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    path, head = tmp_path / "c.safetensors", {"step": 5, "loss": 0.1, "config": {"name": "sit", "sizes": [1, 2]}}
    tensors = sample_tensors()
    save_tensors(path, tensors, head)
    told, back = load_tensors(path)
    assert told == head == read_header(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
        assert not back[name].requires_grad
    assert list(tmp_path.iterdir()) == [path]


def test_loaded_tensors_are_their_own(tmp_path: Path) -> None:
    """Neither tied tensors nor the file change when a loaded tensor is written to, nor when the file is replaced."""
    path = tmp_path / "c.safetensors"
    w = torch.arange(4096.0)
    save_tensors(path, {"a": w, "b": w}, {})
    _, back = load_tensors(path)
    back["a"].zero_()
    save_tensors(path, {"b": torch.full((4096,), 9.0)}, {})
    assert torch.equal(back["b"], w)
    assert torch.equal(load_tensors(path)[1]["b"], torch.full((4096,), 9.0))


def test_equal_checkpoints_are_equal_bytes(tmp_path: Path) -> None:
    tensors = sample_tensors()
    save_tensors(tmp_path / "a", tensors, {"step": 1})
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"step": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_header_that_looks_like_a_pickle_is_still_read(tmp_path: Path) -> None:
    """The first eight bytes are the header's length: 640 = 0x280 begins as a pickle of protocol 2 does."""
    path = tmp_path / "c.safetensors"
    seen = set()
    for size in range(400, 640, 2):
        save_tensors(path, {"w": torch.ones(2)}, {"pad": "x" * size})
        seen.add(path.read_bytes()[:2])
        assert read_header(path) == {"pad": "x" * size}
    assert b"\x80\x02" in seen


def test_every_truncation_is_found_without_reading_tensors(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_tensors(path, {"w": torch.ones(16)}, {"step": 1})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        for read in (read_header, load_tensors):
            with pytest.raises(UserError, match=rf"c\.safetensors is damaged or cut short \({size} bytes\)"):
                read(path)


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", 2, 3, 4, 5])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, form: str | int) -> None:
    path, touched = tmp_path / "model.pt", tmp_path / "touched"
    if isinstance(form, int):
        path.write_bytes(pickle.dumps(Malice(touched), form))
    else:
        torch.save(Malice(touched), path, _use_new_zipfile_serialization=form == "zip")
    for read in (load_tensors, read_header):
        with pytest.raises(UserError, match=r"model\.pt is a pickle.*refuses.*\.safetensors"):
            read(path)
    assert not touched.exists()
    with path.open("rb") as file:  # The trap is real: unpickling springs it.
        torch.load(file, weights_only=False) if isinstance(form, str) else pickle.load(file)
    assert touched.exists()


def test_missing_folder_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match=r"There is no checkpoint .*absent\.safetensors"):
        load_tensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"foreign\.safetensors is a safetensors file without sitkit's header"):
        read_header(tmp_path / "foreign.safetensors")


# Optimizers


def model_of(width: int = 7) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.GELU(), torch.nn.Linear(width, 2))


def optimizer_of(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    weights, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=3e-3, momentum=0.9)
    return torch.optim.AdamW(groups, fused=kind == "fused", amsgrad=kind == "amsgrad", **ADAMW)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps whose data and learning rate are functions of the step, the rate not representable in few digits."""
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] *= 1 / 1.1
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["fused", "plain", "amsgrad", "sgd"])
def test_ten_steps_are_five_a_checkpoint_and_five(tmp_path: Path, kind: str) -> None:
    whole = model_of()
    through = optimizer_of(whole, kind)
    train(whole, through, range(10))

    first = model_of()
    optimizer = optimizer_of(first, kind)
    train(first, optimizer, range(5))
    save_tensors(tmp_path / "c", {**first.state_dict(), **optimizer_tensors(optimizer)}, {"step": 5})

    _, tensors = load_tensors(tmp_path / "c")
    again = model_of()
    again.load_state_dict({name: tensors[name] for name in again.state_dict()})
    resumed = optimizer_of(again, kind)
    load_optimizer(resumed, tensors)
    train(again, resumed, range(5, 10))
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = optimizer_tensors(resumed), optimizer_tensors(through)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert resumed.param_groups[0]["lr"] == through.param_groups[0]["lr"]


def test_without_the_optimizer_the_bits_differ() -> None:
    """The test above could not see a state that is not restored if this did not hold."""
    whole, broken = model_of(), model_of()
    train(whole, optimizer_of(whole, "fused"), range(10))
    train(broken, optimizer_of(broken, "fused"), range(5))
    train(broken, optimizer_of(broken, "fused"), range(5, 10))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), broken.parameters(), strict=True))


def test_a_state_of_other_parameters_is_refused() -> None:
    model = model_of()
    optimizer = optimizer_of(model, "fused")
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(optimizer)
    with pytest.raises(
        UserError, match=r"another model: exp_avg of parameter 0 has shape \(7, 5\), the parameter \(8, 5\)"
    ):
        load_optimizer(optimizer_of(model_of(8), "fused"), tensors)
    with pytest.raises(UserError, match=r"groups of \[2, 2\] parameters; the model has \[4\]"):
        load_optimizer(torch.optim.AdamW(model.parameters()), tensors)
    with pytest.raises(UserError, match="no state of an optimizer"):
        load_optimizer(optimizer, {})


# Folders


def fill(folder: Path, *steps: int) -> None:
    for step in steps:
        save_tensors(folder / f"step-{step:08d}.safetensors", {"w": torch.full((64,), step)}, {"step": step})


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def test_checkpoints_are_sorted_by_step_and_others_ignored(tmp_path: Path) -> None:
    fill(tmp_path, 1000, 5, 123456789)
    for name in ("step-00000007.safetensors.tmp-12", "step-7.safetensors", "best.safetensors", "step-00000009.pt"):
        (tmp_path / name).touch()
    assert [read_header(p)["step"] for p in checkpoints(tmp_path)] == [5, 1000, 123456789]
    assert checkpoints(tmp_path / "absent") == []


def test_latest_passes_over_damaged_ones_and_names_them(tmp_path: Path) -> None:
    said: list[str] = []
    assert latest_checkpoint(tmp_path, said.append) is None and not said
    fill(tmp_path, 1, 2, 3)
    paths = checkpoints(tmp_path)
    assert latest_checkpoint(tmp_path, said.append) == paths[2] and not said
    cut(paths[2])
    with pytest.warns(UserWarning, match=r"step-00000003\.safetensors is damaged"):
        assert latest_checkpoint(tmp_path) == paths[1]
    cut(paths[1])
    cut(paths[0])
    # No checkpoint is not the same as none that can be used: a training would begin again at step 0.
    with pytest.raises(
        UserError, match=r"step-00000003\.safetensors is damaged .* No checkpoint of .* --restart` trains"
    ):
        latest_checkpoint(tmp_path, said.append)
    assert not said


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3, 4)
    paths = checkpoints(tmp_path)
    cut(paths[3])
    (tmp_path / "step-00000004.safetensors.tmp-1").touch()
    prune_checkpoints(tmp_path, 2)
    assert sorted(tmp_path.iterdir()) == paths[1:]
    prune_checkpoints(tmp_path, 9)
    assert sorted(tmp_path.iterdir()) == paths[1:]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        prune_checkpoints(tmp_path, 0)


def test_reading_a_record_imports_no_torch(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {})
    code = "import sys; from sitkit.runtime.files import read_json; read_json(sys.argv[1]); assert 'torch' not in sys.modules"
    process = python(code, str(tmp_path / "a.json"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_an_update_with_the_same_bytes_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    update_file(path, "one")
    before = path.stat()
    update_file(path, "one")
    assert path.stat() == before
    update_file(path, b"two")
    assert path.read_text() == "two" and path.stat().st_ino != before.st_ino


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_each_moment_of_another_shape_is_refused(moment: str) -> None:
    model = model_of()
    optimizer = optimizer_of(model, "fused")
    train(model, optimizer, range(1))
    tensors = dict(optimizer_tensors(optimizer))
    name = next(name for name in tensors if name.endswith(f".0.{moment}"))
    tensors[name] = tensors[name][:-1].clone()
    with pytest.raises(UserError, match=rf"another model: {moment} of parameter 0 has shape \(6, 5\)"):
        load_optimizer(optimizer_of(model_of(), "fused"), tensors)
