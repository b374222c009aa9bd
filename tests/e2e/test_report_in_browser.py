"""The report as a reader sees it: rendered by a real browser, without JavaScript and offline."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from lmscale.run_folder.paths import RunFolder
from lmscale.train.report.page import write_report

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if BROWSER is None:
        pytest.skip(f"NOT CHECKED: no browser ({', '.join(BROWSERS)}); install chromium")
    folder = RunFolder(tmp_path_factory.mktemp("run") / "tales")
    folder.events.mkdir(parents=True)
    folder.config.write_text(
        "model: {num_layers: 2, hidden_size: 128}\ntrain: {steps: 400}\n# the last line\n"
    )
    metrics = [
        {"step": s, "loss": 2 + 4 / math.sqrt(s), "tokens": s * 512, "lr": 1e-3, "grad_norm": 1 / s}
        | {"tokens_per_s": 1e4, "mfu": None}
        for s in range(1, 401)
    ]
    bits = [
        {"step": s, "corpus": "held", "metric": m, "value": v / s**0.2, "count": 100}
        for s in (100, 200, 300, 400)
        for m, v in (("loss", 6.0), ("bits_per_byte", 4.0))
    ]
    bits.append({"step": 0, "corpus": "held", "metric": "bits_per_byte_bigram", "value": 2.5})
    events = [
        {"kind": "start", "time": 1.0},
        {
            "kind": "sample",
            "time": 2.0,
            "prompt": "Once",
            "text": "<script>document.title=1</script>",
        },
        {"kind": "save", "time": 3.0, "step": 400, "path": "step-00000400-a1"},
    ]
    for path, lines in (
        (folder.metrics, metrics),
        (folder.eval, bits),
        (folder.events / "a.jsonl", events),
    ):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report(folder)


def browse(report: Path, tmp_path: Path, *what: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr", *what, report.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def pixels(png: Path) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of RGB of an 8-bit PNG."""
    from matplotlib.image import imread

    image = imread(png)
    rows = [(row[:, :3] * 255).astype("uint8").tobytes() for row in image]
    return image.shape[1], image.shape[0], rows


def test_a_screen_shows_charts_and_nothing_is_refused(report: Path, tmp_path: Path) -> None:
    png = tmp_path / "page.png"
    done = browse(report, tmp_path, f"--screenshot={png}", "--window-size=1280,2400")
    assert "Refused to" not in done.stderr and "violates" not in done.stderr  # its own policy
    width, height, rows = pixels(png)
    assert (width, height) == (1280, 2400)
    colours = {row[i : i + 3] for row in rows for i in range(0, len(row), 3)}
    assert bytes.fromhex("2f6fed") in colours  # the training line
    assert bytes.fromhex("d9591b") in colours  # the validation line
    # nothing sticks out of the column: the outer margins are empty paper
    assert all(set(row[: 3 * 140]) == set(row[-3 * 140 :]) == {255} for row in rows)


def test_paper_shows_what_is_folded_on_a_screen(report: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    browse(report, tmp_path, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    text = pdf_text(pdf)
    assert "the last line" in text  # config.yaml
    assert "step-00000400-a1" in text  # events
    assert "document.title" in text  # a sample is text


def test_a_script_in_a_sample_never_runs(report: Path, tmp_path: Path) -> None:
    dom = browse(report, tmp_path, "--dump-dom").stdout
    assert "<title>tales – training report</title>" in dom
    assert "&lt;script&gt;" in dom and "<script" not in dom


def pdf_text(pdf: Path) -> str:
    """The text of a PDF by pdftotext (poppler)."""
    tool = shutil.which("pdftotext")
    if tool is None:
        pytest.skip("NOT CHECKED: no pdftotext; install poppler-utils")
    return subprocess.run(
        [tool, "-layout", str(pdf), "-"], capture_output=True, text=True, check=True
    ).stdout
