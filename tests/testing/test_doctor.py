"""`sitkit doctor`: what it says of a sound machine, a dead store, a file that is no database, and a missing extra."""

from __future__ import annotations

import importlib.util
import json
import re
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from support import ROOT, call

from sitkit.runs.tracking.store import reach
from sitkit.testing.doctor import EXTRAS, Finding, examine_machine

PYPROJECT = ROOT / "pyproject.toml"


def store(found: list[Finding]) -> Finding:
    return next(finding for finding in found if finding.area == "store")


def test_a_sound_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    done = call("doctor", "--json")
    found = [Finding(**finding) for finding in json.loads(done.out)]
    assert store(found).state == "ok" and not list(tmp_path.iterdir()), "looking creates nothing"
    assert {f.name: f.state for f in found if f.area == "package"}["torch"] == "ok"
    assert done.status == (1 if any(finding.state == "broken" for finding in found) else 0)


def test_every_missing_feature_names_an_extra_that_exists() -> None:
    text = PYPROJECT.read_text(encoding="utf-8")
    for modules, purpose, extra in EXTRAS:
        assert re.search(rf"^{extra} = \[", text, re.M), extra
        finding = next(f for f in examine_machine(0.1) if f.name == purpose)
        here = all(importlib.util.find_spec(module) for module in modules)
        assert (finding.state, finding.remedy) == (
            ("ok", "") if here else ("missing", f"pip install 'sitkit[{extra}]'")
        )


def test_a_store_that_is_down_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    done = call("doctor")
    assert done.status == 1 and "does not answer" in done.out.replace("\n", " ") and "secret" not in done.out


def test_a_store_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Health)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    try:
        assert reach(5) == (f"http://127.0.0.1:{server.server_port}", "")
    finally:
        server.shutdown()
        server.server_close()


def test_a_file_that_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_text("by mistake a text file")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert store(examine_machine(0.1)).detail == "is no SQLite database"
