"""A run as one file, on the hub, and without its data: the samples are those of the run, to the bit."""

from __future__ import annotations

import base64
import http.server
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import Called, autoencoder, call, copied, flags, tiny, trained

import sitkit
from sitkit.data.dataset import load_examples
from sitkit.models.autoencoder import _network as autoencoders
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import load_tensors, save_tensors
from sitkit.training.train import run_training

DRAW = ("-n", "12", "--steps", "3")


def arrays_of(result: Called) -> dict[str, np.ndarray]:
    assert result.status == 0, result.err
    with np.load(Path(result.out.split()[1])) as arrays:
        return {name: arrays[name] for name in arrays.files}


def equal_arrays(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return copied(trained("digits"), tmp_path / "runs")


def test_one_file_samples_and_evaluates_as_its_run_does(folder: Path, tmp_path: Path) -> None:
    result = call("convert", folder, "--to", "one.safetensors")
    assert result.status == 0 and result.out.split() == [
        "written",
        "one.safetensors",
        "next",
        "sitkit",
        "sample",
        "one.safetensors",
    ]
    expected = arrays_of(call("sample", folder, *DRAW))
    value = call("evaluate", folder, *DRAW, "--metric", "sliced-wasserstein", "--json")
    shutil.move(folder, tmp_path / "elsewhere")
    assert equal_arrays(arrays_of(call("sample", "one.safetensors", *DRAW)), expected)
    quiet = ("--set", "run.track=false")
    again = call("evaluate", "one.safetensors", *DRAW, "--metric", "sliced-wasserstein", "--json", *quiet)
    assert again.status == 0, again.err
    (record,), (before,) = json.loads(again.out), json.loads(value.out)
    assert record["value"] == before["value"] and record["training"] == before["training"]
    assert record["command"][2] == "one.safetensors"
    run = sitkit.load("one.safetensors", device="cpu")
    assert run.shape == (1, 8, 8) and run.field.null_class == 10 and run.step == 20
    x = sitkit.samplers.create("heun", steps=2).sample(run.field, torch.randn(3, 1, 8, 8), torch.arange(3)).x
    assert x.shape == (3, 1, 8, 8) and bool(x.isfinite().all())


@pytest.mark.parametrize(
    ("group", "values"),
    [
        ("backbone", {"depth": 10_000, "hidden_size": 2**20}),
        ("backbone", {"depth": 10_000}),
        ("backbone", {"hidden_size": 2**20}),
        ("data", {"shape": [1, 2**16, 2**16]}),
        ("data", {"shape": [1, 2**11, 2**11]}),
        ("data", {"shape": [1, 2**20, 2**20]}),
        ("data", {"class_names": ["a"] * 10**6}),
    ],
)
def test_a_file_that_describes_a_huge_network_is_refused_before_it_is_built(
    folder: Path, group: str, values: dict[str, Any]
) -> None:
    """The weights take 0.5 MB.  A network that is filled with values would take 1 GB or more."""
    call("convert", folder, "--to", "one.safetensors")
    header, tensors = load_tensors("one.safetensors")
    (header["config"] if group == "backbone" else header)[group] |= values
    save_tensors("two.safetensors", tensors, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = call("sample", "two.safetensors", *DRAW)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert result.status == 2 and result.err.count("\n") == 1, result.err
    assert "do not fit into the weights of its run" in result.err or "an example has at most" in result.err
    assert grown < 400 * 1024


def test_other_tools_read_the_weights_and_the_settings(folder: Path) -> None:
    call("convert", folder, "--to", "one.safetensors", "--set", "sampler.steps=7", "--set", "diffusion=zero")
    run = sitkit.load(folder, device="cpu")
    with safe_open("one.safetensors", "pt") as file:
        header = json.loads(file.metadata()["sitkit"])
        assert set(file.keys()) == set(run.network.state_dict())
        assert all(torch.equal(file.get_tensor(n), t) for n, t in run.network.state_dict().items())
    assert header["config"]["sampler"]["steps"] == 7 and "run" not in header["config"]
    assert (
        header["data"]["class_names"] == [str(k) for k in range(10)]
        and header["fingerprints"]["training"] == run.identity
    )
    before = Path("one.safetensors").read_bytes()
    call("convert", folder, "--to", "one.safetensors", "--set", "sampler.steps=7", "--set", "diffusion=zero")
    assert Path("one.safetensors").read_bytes() == before


def test_the_measurements_that_a_sampler_needs_are_in_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--set", "sampler={name: euler-maruyama, steps: 20, grid: adapted}", "--set", "diffusion=kl-eta")
    result = call("convert", folder, "--to", "one.safetensors", *words)
    assert result.status == 0, result.err
    expected = arrays_of(call("sample", folder, "-n", "4", *words))
    monkeypatch.setattr("sitkit.data.digits.Digits.load", raise_missing)
    assert equal_arrays(arrays_of(call("sample", "one.safetensors", "-n", "4")), expected)


def test_a_chosen_average_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_training(
        tiny(tmp_path / "runs", "train.ema=[0.9, 0.5]", "train.posthoc=[0.05, 0.1]", "run.sample_every=0")
    )
    for chosen in ("0.9", "0.5", "0.07"):
        assert call("convert", run, "--to", f"{chosen}.safetensors", "--ema", chosen).status == 0
        over = sitkit.load(f"{chosen}.safetensors", device="cpu")
        assert over.weights_name == f"ema-{chosen}"
        assert equal_arrays(
            arrays_of(call("sample", f"{chosen}.safetensors", *DRAW)),
            arrays_of(call("sample", run, *DRAW, "--ema", chosen)),
        )
    for words, said in (
        (("--ema", "0.9"), "holds the weights 'ema-0.5' alone, not 'ema-0.9'"),
        (("--step", "3"), "holds step 40 alone"),
        (("--set", "train.lr=1"), "was fixed when"),
    ):
        refused = call("sample", "0.5.safetensors", *DRAW, *words)
        assert refused.status == 2 and said in refused.err.replace("\n", " ") and "Traceback" not in refused.err


def test_an_autoencoder_from_a_folder_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = autoencoder(tmp_path / "vae", channels=1)
    chosen = f"autoencoder={{name: sd-vae, path: {weights}}}"
    run = run_training(tiny(tmp_path / "runs", chosen, "train.steps=2", "run.sample_every=0", base="digits"))
    expected = arrays_of(call("sample", run, *DRAW))
    result = call("convert", run, "--to", "one.safetensors")
    assert result.status == 0 and not result.err
    shutil.rmtree(weights)
    shutil.rmtree(run)
    (tmp_path / "moved").mkdir()
    shutil.move("one.safetensors", "moved/one.safetensors")
    autoencoders.cache_clear()
    assert equal_arrays(arrays_of(call("sample", "moved/one.safetensors", *DRAW)), expected)
    assert call("convert", "moved/one.safetensors", "--to", "two.safetensors").status == 0
    read = "import sys; from sitkit.models.autoencoder import SDVAE; SDVAE(path=sys.argv[1]).latent_shape((1, 8, 8))"
    said = subprocess.run([sys.executable, "-c", read, "moved/one.safetensors"], capture_output=True, check=True)
    assert not said.stderr
    shutil.rmtree("moved")
    assert equal_arrays(arrays_of(call("sample", "two.safetensors", *DRAW)), expected)


def raise_missing(*_: Any) -> None:
    raise UserError("the data are gone")


@pytest.mark.parametrize("base", ["digits", "points"])
def test_a_run_samples_when_its_data_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = copied(trained(base), tmp_path / "runs")
    expected = arrays_of(call("sample", run, *DRAW))
    shutil.rmtree(run / "samples")
    monkeypatch.setattr("sitkit.data.dataset.Dataset.load", raise_missing)
    for kind in ("digits.Digits", "toy.Points"):
        monkeypatch.setattr(f"sitkit.data.{kind}.load", raise_missing)
    load_examples.cache_clear()
    assert equal_arrays(arrays_of(call("sample", run, *DRAW)), expected)
    assert next(run.glob("samples/*/grid.png")).stat().st_size > 1000
    assert call("convert", run, "--to", "one.safetensors").status == 0
    assert equal_arrays(arrays_of(call("sample", "one.safetensors", *DRAW)), expected)
    refused = call("evaluate", run, *DRAW)
    assert refused.status == 2 and "the data are gone" in refused.err and "Traceback" not in refused.err


def test_other_data_in_place_of_the_old_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    np.savez("mine.npz", images=images)
    words = flags("data={name: npz, path: mine.npz}", "train.steps=2", base="digits")
    assert call("train", "digits", *words).status == 0
    np.savez("mine.npz", images=255 - images)
    load_examples.cache_clear()
    refused = call("evaluate", "latest", *DRAW)
    assert refused.status == 2 and "changed since it was trained" in refused.err.replace("\n", " ")
    assert call("sample", "latest", *DRAW).status == 0


def test_files_of_other_kinds_are_refused(folder: Path, tmp_path: Path) -> None:
    call("convert", folder, "--to", "one.safetensors")
    header, tensors = load_tensors("one.safetensors")
    name, tensor = next(iter(tensors.items()))
    save_tensors("changed.safetensors", {**tensors, name: tensor + 1}, header)
    save_tensors("later.safetensors", tensors, {**header, "format": 2})
    save_tensors(
        "lacking.safetensors",
        tensors,
        {
            **header,
            "config": header["config"] | {"interp": {"name": "poly"}},
            "components": {"interpolant poly": "sitkit-poly 1.0"},
        },
    )
    save_file(tensors, "strange.safetensors")
    Path("cut.safetensors").write_bytes(Path("one.safetensors").read_bytes()[:-10])
    torch.save(tensors, "pickle.safetensors")
    for file, said in (
        ("changed", "the weights changed since the file was written"),
        ("later", "upgrade it"),
        ("lacking", "pip install sitkit-poly==1.0"),
        ("strange", "without sitkit's header"),
        ("cut", "cut short"),
        ("pickle", "pickle"),
    ):
        refused = call("sample", f"{file}.safetensors", *DRAW)
        assert refused.status == 2 and said in refused.err.replace("\n", " "), refused.err
        assert "Traceback" not in refused.err
    for words, said in (
        (("convert", folder, "--to", "one.zip"), "give a .safetensors"),
        (("convert", folder, "--ema", "0.9"), "add --to"),
        (("convert", folder, "--to", "one.pt", "--private"), "--private belongs"),
        (("convert", folder, "--to", "hf://one"), "hf://owner/name"),
        (("sample", "hf://one"), "hf://owner/name"),
        (("report", "one.safetensors"), "needs a run's folder"),
    ):
        refused = call(*words)
        assert refused.status == 2 and said in refused.err.replace("\n", " "), refused.err


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload and a download of small files need."""

    files: dict[str, bytes]
    requests: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        self.requests.append(f"{self.command} {self.path}")

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(body)), "X-Repo-Commit": "c" * 40, **headers}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/one/network"
        if self.path == "/api/repos/create":
            self.answer({"url": address})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
        elif "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{address}/commit/{'c' * 40}", "commitOid": "c" * 40})
        else:
            self.answer({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path and name in self.files:
            self.answer(self.files[name], ETag=f'"{name}"')
        else:
            self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET


@pytest.fixture
def server() -> Iterator[tuple[str, type[Hub]]]:
    kind = type("Own", (Hub,), {"files": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", kind
        server.shutdown()


def call_in_process(*words: str | Path, **environment: str) -> Called:
    """The command as a process of its own: huggingface_hub reads its environment when it is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "sitkit", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return Called(result.returncode, result.stdout, result.stderr)


def test_to_the_hub_and_back(folder: Path, tmp_path: Path, server: tuple[str, type[Hub]]) -> None:
    address, hub = server
    there = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_TOKEN": "hf_none",
        "HF_HUB_DISABLE_XET": "1",
    }
    result = call_in_process("convert", folder, "--to", "hf://one/network", **there)
    assert result.status == 0, result.err
    assert set(hub.files) == {"model.safetensors", "README.md"}
    assert (
        b"library_name: sitkit" in hub.files["README.md"]
        and b"sitkit sample hf://one/network" in hub.files["README.md"]
    )
    expected = arrays_of(call("sample", folder, *DRAW))
    shutil.rmtree(folder)
    assert equal_arrays(arrays_of(call_in_process("sample", "hf://one/network", *DRAW, **there)), expected)
    absent = call_in_process("sample", "hf://one/other@v1", *DRAW, **there, HF_HUB_OFFLINE="1")
    assert absent.status == 2 and "Traceback" not in absent.err and len(absent.err.strip().splitlines()) <= 3
