"""The report: one file that needs nothing else, seen by a real browser where there is one."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from kohya_mps.core import settings
from kohya_mps.core.settings import Settings
from kohya_mps.train import html_report, svg_chart
from kohya_mps.train.runs import Resumption, Run
from kohya_mps.train.svg_chart import Series
from tests.support.training_runs import made, step_line

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return msgspec.structs.replace(settings.load(), home=tmp_path / "home")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of 30 steps with samples of two prompts at three moments."""
    run = made(tmp_path)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 31)))
    run.begun_file.write_text('{"total": 30, "device": "cpu", "processes": 1, "pid": 1}')
    run.ended_file.write_text('{"how": "finished", "step": 30, "error": ""}')
    run.log.write_text("all well\nWARNING   the <second> thing\nWARNING   the <second> thing\n")
    (tmp_path / "prompts.txt").write_text("# comment\na red circle --w 64\na <b>square\n")
    run.samples.mkdir()
    for number, moment in enumerate(("000010", "000020", "e000003")):
        for prompt in (0, 1):
            name = f"cat_{moment}_{prompt:02d}_2026010203040{number}_7.png"
            Image.new("RGB", (8, 8), (60 * number, 90 * prompt, 200)).save(run.samples / name)
    return run


class Tags(HTMLParser):
    """Counts tags and keeps everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.fetched += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "data", "action")]


def test_the_report_needs_nothing_but_itself(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    tags = Tags(text)
    assert tags.tags["script"] == 0
    assert all(value.startswith("data:image/png;base64,") for value in tags.fetched)
    assert "url(" not in text
    assert "@import" not in text


def test_it_has_the_curves_and_every_sample_in_its_place(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    tags = Tags(text)
    assert tags.tags["svg"] == 3
    assert tags.tags["img"] == 6
    heads = [text.index(f"<th>{moment}</th>") for moment in ("step 10", "step 20", "epoch 3")]
    assert heads == sorted(heads)
    assert "a red circle" in text


def test_what_comes_from_files_cannot_become_markup(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    assert "<b>square" not in text
    assert "# &lt;b&gt;mine&lt;/b&gt;" in text
    assert text.count("the &lt;second&gt; thing") == 1


def test_settings_versions_and_digests_are_in_it(here: Settings, run: Run) -> None:
    lora = run.output / "cat.safetensors"
    lora.write_bytes(b"weights")

    text = html_report.html(here, run)

    for expected in ("2.5.1", "ab" * 32, "cd" * 32, "networks.lora"):
        assert expected in text
    digest = subprocess.run(["sha256sum", lora], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digest in text


def test_resumptions_are_named(here: Settings, run: Run) -> None:
    again = Resumption("2026-01-02T04:00:00+00:00", 20, "validated-1")
    run.save(msgspec.structs.replace(run.record(), resumed=(again,)))

    assert "resumed after step 20" in html_report.html(here, run)


def test_a_run_without_a_step_still_has_a_report(here: Settings, tmp_path: Path) -> None:
    text = html_report.html(here, made(tmp_path))

    assert "nothing to draw yet" in text


def test_a_sample_drawn_again_after_a_resume_is_shown_once(run: Run) -> None:
    Image.new("RGB", (8, 8), "white").save(run.samples / "cat_000020_00_20260102990000_7.png")

    names = [sample.path.name for sample in html_report.samples(run)]

    assert "cat_000020_00_20260102990000_7.png" in names
    assert len(names) == 6


def test_many_samples_are_picked_evenly_and_the_last_is_kept(here: Settings, run: Run) -> None:
    for step in range(100, 3100, 100):
        name = f"cat_{step:06d}_00_20260102{step:06d}_7.png"
        Image.new("RGB", (8, 8), "blue").save(run.samples / name)

    text = html_report.html(here, run)

    shown = re.findall(r"<th>(step \d+|epoch \d+)</th>", text)
    assert len(shown) == 8
    assert shown[-1] == "step 3000"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome here")
def test_a_browser_without_a_network_shows_it(here: Settings, run: Run, tmp_path: Path) -> None:
    assert BROWSER is not None
    html_report.report(here, run.path)
    picture = tmp_path / "seen.png"
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,2400")
    nowhere = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}")
    where = (f"--screenshot={picture}", f"file://{run.report}")
    subprocess.run([BROWSER, *flags, *nowhere, *where], capture_output=True, check=True, timeout=120)

    with Image.open(picture) as seen:
        colours = seen.convert("RGB").getcolors(seen.width * seen.height) or []
    present = {colour for count, colour in colours if count > 100}
    # The six samples' colours, and the line of the average.
    assert {(60 * n, 90 * p, 200) for n in range(3) for p in (0, 1)} <= present
    assert (37, 99, 235) in present


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    drawn = svg_chart.lines("t", [Series("s", [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)], "one")])

    points = re.findall(r'points="([^"]+)"', drawn)[0].split()
    assert len(points) == 2
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_a_chart_of_many_points_keeps_the_peaks() -> None:
    values = [(n, 100.0 if n == 77_777 else 1.0 + n % 2) for n in range(100_000)]

    drawn = svg_chart.lines("t", [Series("s", values, "one")])

    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', drawn)[0].split()]
    assert len(points) < 2000
    assert min(y for _, y in points) < 15


def test_a_constant_is_a_level_line() -> None:
    drawn = svg_chart.lines("t", [Series("s", [(1, 3.0), (2, 3.0)], "one")])

    ys = {p.split(",")[1] for p in re.findall(r'points="([^"]+)"', drawn)[0].split()}
    assert len(ys) == 1
