"""A report is one file with the content of the folder, which a browser shows without a network."""

from __future__ import annotations

import base64
import functools
import html
import html.parser
import json
import re
import shlex
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import call, copied, trained

from sitkit.evaluation.images import image_sheet, size_of
from sitkit.evaluation.plots import Curve
from sitkit.results.report import report
from sitkit.results.report.charts import interval_chart, line_chart, thinned
from sitkit.results.report.page import Page, Section, Table
from sitkit.results.report.run import _facts, lower_is_better, metric_name, read_training, sampling_name
from sitkit.results.reproduce import evaluate_command
from sitkit.results.statistics import Estimate
from sitkit.results.study_results import read_results, runs_of
from sitkit.results.table import TableCell
from sitkit.results.table import format_estimate as shown
from sitkit.runtime.errors import LeftOut, UserError
from sitkit.runtime.files import read_json, write_json

MADE = tempfile.TemporaryDirectory(prefix="sitkit-reports-")
LARGEST = 5_000_000
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@functools.cache
def measured(base: str) -> Path:
    """A run that was sampled and measured in three ways; two of them differ in their cost only."""
    folder = copied(trained(base), Path(MADE.name) / base)
    ways = (["--sampler", "heun", "--steps", "2"], ["--sampler", "heun", "--steps", "4"],
            ["--sampler", "euler-maruyama", "--diffusion", "sigma", "--steps", "6", "--set", "sampler.last_step=tweedie"])  # fmt: skip
    for way in ways:
        result = call("evaluate", folder, "-n", "70", *way, "--set", "run.track=false")
        assert result.status == 0, result.err
    return folder


@functools.cache
def written(base: str) -> Path:
    return report(measured(base))


def page_of(of: str) -> Path:
    return studied() / "report.html" if of == "study" else written(of)


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, and whether each is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("base", ["points", "digits"])
def test_the_page_needs_no_other_file(base: str) -> None:
    path = written(base)
    text = path.read_text()
    assert path == measured(base) / "report.html" and len(text) < LARGEST
    page = Elements(text)
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert not {"link", "iframe", "object", "embed", "base"} & set(tags)
    for tag, attributes in page.found:
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    identities = [
        attributes["id"]
        for _, attributes in page.found
        if "id" in attributes and not (attributes["id"] or "").startswith(("m", "p"))
    ]
    assert len(identities) == len(set(identities))
    # The page works with a screen reader and with a keyboard.
    assert all(attributes.get("alt") for tag, attributes in page.found if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in page.found if tag == "svg")
    assert all(
        attributes.get("aria-sort")
        for tag, attributes in page.found
        if tag == "th" and attributes.get("scope") == "col"
    )
    assert [tag for tag in tags if tag in ("main", "nav", "header", "footer")] == ["header", "nav", "main", "footer"]
    assert tags.count("h1") == 1 and tags.count("svg") >= 4


def test_the_summary_has_no_setting_that_is_unset() -> None:
    text = written("digits").read_text()
    summary = text[text.index(">Summary</h2>") : text.index(">Results</h2>")]
    assert "velocity" in summary and "null" not in summary and "None" not in summary


def test_the_page_has_the_numbers_of_the_folder() -> None:
    folder, text = measured("digits"), written("digits").read_text()
    records = [read_json(path) for path in (folder / "evaluations").iterdir()]
    assert len(records) == 3
    for record in records:
        assert f'data-key="{record["value"]!r}"' in text and f"{record['value']:.4g}" in text
    assert folder.name in text and "20 of 20" in text
    environment = read_json(folder / "environment.json")
    assert environment["packages"]["torch"] in text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("checkpoints/*.safetensors", "is damaged or cut short"),
        ("samples/*/samples.npz", "is damaged"),
        ("samples/*/record.json", "is not the record of samples"),
        ("evaluations/*.json", "is not the record of a number"),
        ("velocity-loss-*.json", "is not the record of a measurement"),
        ("environment.json", None),
    ],
)
def test_a_page_goes_on_past_a_damaged_file_and_names_it(pattern: str, message: str | None, tmp_path: Path) -> None:
    folder = copied(measured("digits"), tmp_path)
    if pattern.startswith("velocity"):
        path = sorted(folder.glob("evaluations/*.json"))[0]
        record = read_json(path)
        record["sampling"]["recipe"]["diffusion"] = {"name": "kl-eta", "eta": 1.0}
        write_json(path, record)
        (folder / "velocity-loss-ema-00000020.json").touch()
    path = sorted(folder.glob(pattern))[0]
    path.write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result, listed = call("report", folder), call("runs", "--runs", tmp_path)
    text = (folder / "report.html").read_text()
    assert result.status == 0 and "Traceback" not in result.err, result.err
    if message is not None:
        for output in (result.err, html.unescape(text)):
            assert str(path) in output and message in output, output[:2000]
    assert listed.status == 0
    assert ("is not the record of a number" in listed.err) == pattern.startswith("evaluations")


def test_a_page_takes_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    folder = copied(measured("digits"), tmp_path)
    (newest,) = (folder / "checkpoints").glob("*.safetensors")
    shutil.copy(newest, newest.with_name("step-00000030.safetensors"))
    newest.with_name("step-00000030.safetensors").write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="step-00000030.safetensors is damaged .* passed over"):
        report(folder)
    text = (folder / "report.html").read_text()
    assert "20 of 20" in text and "parameters" in text


def test_the_command_of_a_number_computes_it_again(tmp_path: Path) -> None:
    paths = list((measured("digits") / "evaluations").iterdir())
    assert len(paths) == 3
    for path in paths:
        record = read_json(path)
        folder = copied(trained("digits"), tmp_path / path.stem)
        words = shlex.split(evaluate_command(folder, record))
        assert words[:2] == ["sitkit", "evaluate"]
        result = call(*words[1:], "--set", "run.track=false", "--json")
        assert result.status == 0, result.err
        (again,) = json.loads(result.out)
        assert again["value"] == record["value"] and Path(again["path"]).name == path.name


def test_the_samples_of_the_page_are_those_on_disk_in_their_order() -> None:
    import io

    import numpy as np
    from PIL import Image

    text = written("digits").read_text()
    shown = [base64.b64decode(code) for code in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert len(shown) == 4  # The data, and each set of samples.
    sheets = [np.asarray(Image.open(io.BytesIO(data)).convert("L")) for data in shown[1:]]
    folders = list((measured("digits") / "samples").iterdir())
    assert len(folders) == 3
    for folder in folders:
        with np.load(folder / "samples.npz") as arrays:
            images = arrays["images"][..., 0]
        first, last = images[0], images[59]
        assert any(np.array_equal(sheet[:8, :8], first) and np.array_equal(sheet[-8:, -8:], last) for sheet in sheets)


def test_the_command_line_writes_it(tmp_path: Path) -> None:
    folder = measured("points")
    result = call("report", folder, "--to", tmp_path / "a" / "page.html", "--json")
    assert result.status == 0, result.err
    assert json.loads(result.out) == {
        "report": str(tmp_path / "a" / "page.html"),
        "bytes": (tmp_path / "a" / "page.html").stat().st_size,
    }
    result = call("report", "latset", "--runs", folder.parent)
    assert result.status == 2 and "No run" in result.err


def test_numbers_with_different_settings_have_different_names() -> None:
    """Rows with a file of statistics, random labels or another average have distinct names."""
    recipe = {
        "sampler": {"name": "heun"}, "diffusion": {"name": "zero"}, "guidance": {"name": "none"},
        "sample": {"weights": "ema", "ema": None, "labels": "balanced"},
    }  # fmt: skip
    others = [{"ema": 0.05}, {"labels": "random"}, {"labels": [1, 2]}, {"weights": "raw"}]
    ways = [sampling_name({**recipe, "sample": recipe["sample"] | other}) for other in ({}, *others)]
    assert ways == ["heun", "heun, ema 0.05", "heun, labels random", "heun, labels 1 2", "heun, raw"]
    metric = {"name": "frechet", "features": {"name": "inception"}}
    assert metric_name({"metric": metric | {"reference": None}}) == "frechet on inception"
    assert metric_name({"metric": metric | {"reference": "a/b.npz"}}) == "frechet on inception against b.npz"


def test_the_page_of_a_run_without_numbers_has_the_command_that_computes_one(tmp_path: Path) -> None:
    folder = copied(trained("points"), tmp_path)
    (folder / "metrics.jsonl").write_text("")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    text = report(folder).read_text()
    assert f"sitkit evaluate {folder}" in text and "has reached step 0 of 40" in text
    with pytest.raises(UserError, match="No run"):
        report("nothing", runs=folder.parent)


def test_names_are_text_and_never_markup() -> None:
    hostile = "<script>alert(1)</script>\"'&"
    table = Table(hostile, (hostile,), [[TableCell(hostile, code=hostile, reference=hostile)]])
    text = Page(hostile, hostile, hostile, [Section(hostile, hostile, [table])]).html()
    assert "<script>alert" not in text and text.count("&lt;script&gt;") >= 8
    svg = line_chart(
        [Curve(hostile, [0, 1], [0, 1]), Curve("$a_b$", [0, 1], [1, 0])], label=hostile, xlabel=hostile, ylabel=""
    )
    assert "<script" not in svg and "$a_b$" in svg
    assert Elements(svg).open == []


# Studies

BASE = """
data: {name: digits}
backbone: {name: sit-xs/4, hidden_size: 32, depth: 1, num_heads: 2}
train: {steps: 6, batch: 8, lr: 1e-3, ema: 0.9}
sample: {n: 70}
run: {threads: 1, track: false, sample_every: 0, log_every: 2}
"""
STUDY = """
title: "Two samplers <b>"
source: "Author, 1900"
base: base.yaml
metric: frechet
set: {target: velocity}
seeds: [0, 1]
rows:
  - {label: ODE, sampler: heun, columns: {"4": {sampler: {steps: 2}}, "8": {sampler: {steps: 4}}}, paper: {"4": 2.5}}
  - {label: SDE, sampler: {name: euler-maruyama, last_step: tweedie}, diffusion: sigma}
  - {label: wild, sampler: heun, train: {lr: 1e30}, columns: {"4": {sampler: {steps: 2}}, "8": {sampler: {steps: 4}}}}
columns: {"4": {sampler: {steps: 4}}, "8": {sampler: {steps: 8}}}
"""


@functools.cache
def studied() -> Path:
    """The folder of a study with a row that failed, and with its report."""
    folder = Path(MADE.name) / "study"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    (folder / "study.yaml").write_text(STUDY)
    result = call("ablate", folder / "study.yaml", "--runs", folder / "runs")
    assert result.status == 1 and result.err.count("wild") >= 4, result.err
    assert call("report", folder / "study.yaml", "--runs", folder / "runs").status == 0
    return folder / "studies" / "study"


def test_the_page_of_a_study_has_its_results() -> None:
    results = read_results(studied())
    text = (studied() / "report.html").read_text()
    page = Elements(text)
    assert page.open == [] and len(text) < LARGEST
    for name in ("study", "study.yaml", studied()):
        assert report(name, runs=studied().parent.parent / "runs") == studied() / "report.html"
    for estimate in results.estimates:
        assert f'data-key="{estimate.mean!r}"' in text and shown(estimate.mean, estimate.stderr) in text
    marked = text.count('class="n best"') + text.count('class="n close"')
    assert marked == sum(estimate.standing in ("best", "close") for estimate in results.estimates)
    assert "published 2.5" in text and "Author, 1900" in text and "&lt;b&gt;" in text
    assert "The loss became" in text and "4 of 12 cells have no number" in text
    done = [cell for cell in results.cells if cell.state == "done"]
    assert len(done) == 8
    for cell in done:
        record = read_json(runs_of(studied(), results) / str(cell.evaluation))
        command = evaluate_command(runs_of(studied(), results) / str(cell.run), record)
        assert html.escape(command).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in text


def test_a_study_of_costs_is_shown_as_curves_with_errors() -> None:
    text = (studied() / "report.html").read_text()
    assert (
        "frechet against evaluations" in text and ">SDE</text>" in text and ">evaluations a sample (NFE)</text>" in text
    )
    assert text.count("data:image/png") == 5  # The data, and two rows at two costs.


def test_a_study_without_results_is_refused_with_the_command_that_computes_them(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    with pytest.raises(UserError, match="sitkit ablate"):
        report(tmp_path / "study.yaml", runs=tmp_path / "runs")


# Charts


def test_a_chart_takes_its_colours_from_the_page_and_has_its_text_as_text() -> None:
    svg = line_chart(
        [Curve("one", [1, 2], [3.0, 4.0]), Curve("two", [1, 2], [4.0, 3.0], [0.1, 0.1])],
        label="x",
        xlabel="steps",
        ylabel="loss",
    )
    assert svg.startswith("<svg viewBox=") and svg.endswith("</svg>") and 'role="img"' in svg
    assert ">steps</text>" in svg and ">two</text>" in svg
    assert "currentColor" in svg and "var(--c0)" in svg and "var(--c1)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set(), "a fixed colour would be lost on one of two backgrounds"
    assert svg == line_chart(
        [Curve("one", [1, 2], [3.0, 4.0]), Curve("two", [1, 2], [4.0, 3.0], [0.1, 0.1])],
        label="x",
        xlabel="steps",
        ylabel="loss",
    )


def test_a_long_curve_is_thinned_to_the_means_of_its_parts() -> None:
    import numpy as np

    x = np.arange(3000.0)
    thin = thinned(Curve("loss", x, 2 * x + 1))
    assert len(thin.x) == 300
    assert np.allclose(thin.values, 2 * np.asarray(thin.x) + 1) and np.mean(thin.values) == pytest.approx(
        np.mean(2 * x + 1)
    )


def test_intervals_show_each_number_at_its_row() -> None:
    svg = interval_chart(
        [
            Estimate(1.0, 0.1, row="Linear", column="ODE"),
            Estimate(2.0, row="Linear", column="SDE"),
            Estimate(3.0, 0.2, row="GVP", column="ODE"),
        ],
        label="x",
        xlabel="FID",
    )
    assert all(f">{word}</text>" in svg for word in ("Linear", "GVP", "ODE", "SDE", "FID"))


@pytest.mark.parametrize(("side", "channels", "kind"), [(8, 1, b"\x89PNG"), (96, 3, b"\x89PNG"), (200, 3, b"RIFF")])
def test_a_sheet_is_small(side: int, channels: int, kind: bytes) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 255, (20, side, side, channels), dtype=np.uint8)
    data = image_sheet(images, 5)
    assert data.startswith(kind)
    width, height = size_of(data)
    assert width <= 5 * (96 + 6) and height <= 4 * (96 + 6) and width >= 5 * min(side, 96)


# In a browser


class Offline:
    """A page in headless Chromium that can reach nothing."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int = 1440, dark: bool = False) -> Any:
        driver = self.driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.resolve().as_uri())
        assert driver.get_log("browser") == []
        return driver


@pytest.fixture(scope="module")
def chromium() -> Iterator[Offline]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # A proxy that is not there: whatever the page would fetch fails, and a failure is in the browser's log.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{free.getsockname()[1]}"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--proxy-server={nowhere}"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Offline(driver)
    driver.quit()


@pytest.mark.parametrize("of", ["points", "digits", "study"])
@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True)])
def test_it_opens_from_disk_and_fits(chromium: Offline, of: str, width: int, dark: bool) -> None:
    driver = chromium.open(page_of(of), width, dark)
    assert (
        driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    )
    wide = "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    assert driver.execute_script(wide) == []
    sizes = driver.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) >= 3 and all(complete and natural > 0 for complete, natural in sizes)
    charts = driver.execute_script(
        "return [...document.querySelectorAll('.charts svg')].map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert len(charts) >= 4 and all(w > 250 and h > 150 for w, h in charts)
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 3 * 60) == dark
    assert (
        driver.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
        )
        == 0
    )


CONTRAST = """
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                     return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { while (e) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; e = e.parentElement; } };
return [...document.querySelectorAll('h1, h2, h3, p, dt, dd, td, th, th button, caption, figcaption, code, pre, summary, a, svg text, .copy button')]
  .filter(e => e.textContent.trim() && e.checkVisibility())
  .map(e => { const s = getComputedStyle(e), a = light(s[e.tagName === 'text' ? 'fill' : 'color']), b = light(behind(e));
              return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ' ' + e.textContent.slice(0, 40)]; })
  .filter(([ratio]) => ratio < 4.5);
"""


@pytest.mark.parametrize("of", ["digits", "study"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(chromium: Offline, of: str, dark: bool) -> None:
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5 at least."""
    assert chromium.open(page_of(of), dark=dark).execute_script(CONTRAST) == []


def test_tables_sort_by_mouse_and_by_keys(chromium: Offline) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = chromium.open(written("digits"))
    table = driver.find_element(By.CSS_SELECTOR, "table")
    heads = table.find_elements(By.CSS_SELECTOR, "thead th")
    at = [head.text.split()[0] for head in heads].index("value")

    def shown() -> list[float]:
        keys = "return [...arguments[0].tBodies[0].rows].map(r => r.cells[arguments[1]].dataset.key)"
        return [float(key) for key in driver.execute_script(keys, table, at)]

    values = sorted(shown())
    assert len(set(values)) == 3 and heads[at].get_attribute("aria-sort") == "none"
    heads[at].find_element(By.TAG_NAME, "button").click()
    assert shown() == values and heads[at].get_attribute("aria-sort") == "ascending"
    heads[at].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert shown() == values[::-1] and heads[at].get_attribute("aria-sort") == "descending"
    heads[0].find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
    assert [head.get_attribute("aria-sort") for head in heads[: at + 1]] == ["ascending", *["none"] * at]


def test_every_control_can_be_reached_by_keys(chromium: Offline) -> None:
    from selenium.webdriver.common.keys import Keys

    driver = chromium.open(written("digits"))
    wanted = driver.execute_script(
        "return [...document.querySelectorAll('a, button, summary, [tabindex]')].filter(e => e.checkVisibility()).length"
    )
    reached = set()
    for _ in range(wanted + 2):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(driver.execute_script("return [...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    assert len(reached) >= wanted
    assert (
        driver.execute_script(
            "document.querySelector('th button').focus(); return getComputedStyle(document.activeElement).outlineStyle"
        )
        != "none"
    )


def test_a_command_is_copied_whole(chromium: Offline) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    driver = chromium.open(written("digits"))
    driver.find_element(By.CSS_SELECTOR, "td details summary").click()
    box = driver.find_element(By.CSS_SELECTOR, "td .copy")
    text, button = box.find_element(By.TAG_NAME, "code").text, box.find_element(By.TAG_NAME, "button")
    button.click()
    WebDriverWait(driver, 5).until(lambda _: button.text in ("Copied", "Selected"))
    folder = measured("digits")
    assert text in {evaluate_command(folder, read_json(path)) for path in (folder / "evaluations").iterdir()}
    assert driver.find_element(By.ID, "said").get_attribute("textContent").startswith("Command")


def test_the_best_of_a_metric_that_rises_is_the_largest() -> None:
    records = [{"metric": {"name": name}, "value": value} for name, value in (("precision", 0.2), ("precision", 0.7))]
    assert not lower_is_better(records[0]) and lower_is_better({"metric": {"name": "frechet"}})
    facts = _facts(read_training(measured("digits"), LeftOut()), records)
    assert facts["best precision"] == "0.7"
