"""The five scripts of the README run, as a program and in a Jupyter kernel."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from support import BASE, ROOT

# The sizes of the README, and sizes that take seconds.
TINY = {
    "steps=2000": "steps=4, backbone='sit-xs/2'",
    '"train.lr": 1e-3': '"train.lr": 1e-3, "train.batch": 8, "run.track": False',
    "steps=50, n=64": "steps=2, n=16",
    "n=2000": "n=16",
    "workers=4": "workers=1",
    "trials=50": "trials=1",
}
STUDY = "title: tiny\nbase: base.yaml\nset: {sampler: {name: heun, steps: 2}}\nrows: [{label: a, interp: linear}]\n"
SEARCH = """
objective: {metric: frechet, against: nfe, nfe: 4}
space: {sampler: [euler], nfe: {low: 2, high: 4}}
screen: {n: 16, seed: 0}
confirm: {n: 16, seeds: [1, 2], fresh: [3, 4], best: 1}
trials: 1
"""


def scripts() -> str:
    """Return the block of the README that holds the five scripts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("\n## In Python\n")[2]
    return section.partition("```python\n")[2].partition("\n```")[0]


def test_the_five_scripts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments"
    folder.mkdir()
    for name, content in (("base", BASE), ("table6", STUDY), ("search", SEARCH)):
        (folder / f"{name}.yaml").write_text(content)
    text = scripts()
    for size, tiny in TINY.items():
        assert size in text, f"{size} is not in the scripts of the README"
        text = text.replace(size, tiny)
    values: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), values)
    assert {"run", "images", "numbers", "study", "best"} <= values.keys()
    assert "±" in repr(values["numbers"])


@pytest.mark.slow
def test_a_notebook_shows_a_bar_and_a_picture(tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [
        "import sitkit",
        # Long enough for a bar, which appears after two seconds.
        'run = sitkit.train("digits", interp="gvp", steps=300, settings={"run.track": False})',
        'sitkit.sample(run, sampler="heun", steps=4, n=16)',
        'sitkit.evaluate(run, metric=["frechet", "precision"], n=64)',
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    _, train, sample, evaluate = ([output.get("data", {}) for output in cell["outputs"]] for cell in notebook.cells)
    assert any("train" in data.get("text/plain", "") and "300/300" in data["text/plain"] for data in train), train
    pictures = [base64.b64decode(data["image/png"]) for data in sample if "image/png" in data]
    assert [picture[:4] for picture in pictures] == [b"\x89PNG"]
    assert any(data.get("text/plain", "").count("±") == 2 for data in evaluate), evaluate
    if os.environ.get("SITKIT_PICTURE"):
        Path(os.environ["SITKIT_PICTURE"]).write_bytes(pictures[0])
