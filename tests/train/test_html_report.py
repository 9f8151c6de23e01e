"""The report: one file that needs nothing else, seen by a real browser where there is one."""

from __future__ import annotations

import json
import os
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
from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import Settings
from kohya_mps.install import receipt
from kohya_mps.install.checkout import Commits
from kohya_mps.install.generations import Generation
from kohya_mps.install.receipt import Receipt, Verdict
from kohya_mps.train import html_report
from kohya_mps.train.runs import Process, Resumption, Run
from tests.support.training_runs import begin, end, made, made_by_0_1_0, step_line
from tests.support.world import World

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return msgspec.structs.replace(settings.load(), home=tmp_path / "home")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of 30 steps with samples of two prompts at three moments."""
    run = made(tmp_path)
    run.steps_file.write_text("".join(step_line(n) for n in range(1, 31)))
    begin(run, total=30)
    end(run, "finished", 30)
    run.log.write_text("all well\nWARNING   the <second> thing\nWARNING   the <second> thing\n")
    (tmp_path / "prompts.txt").write_text("# comment\na red circle --w 64\na <b>square\n")
    run.samples.mkdir()
    for number, moment in enumerate(("000010", "000020", "e000003")):
        for prompt in (0, 1):
            name = f"cat_{moment}_{prompt:02d}_2026010203040{number}_7.png"
            Image.new("RGB", (8, 8), (60 * number, 90 * prompt, 200)).save(run.samples / name)
    return run


class Tags(HTMLParser):
    """A page as a browser reads it: its tags, its attributes, its text, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.fetched += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_needs_no_other_file(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    tags = Tags(text)
    assert tags.tags["script"] == 0
    assert all(value.startswith("data:image/png;base64,") for value in tags.fetched)
    assert "url(" not in text
    assert "@import" not in text


def test_it_has_the_curves_and_every_sample_in_its_column(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    tags = Tags(text)
    assert tags.tags["svg"] == 3
    assert tags.tags["img"] == 6
    heads = [text.index(f"<th>{moment}</th>") for moment in ("step 10", "step 20", "epoch 3")]
    assert heads == sorted(heads)
    assert "a red circle" in text


def hostile(field: str) -> str:
    """Markup that is different for each field, with every character that HTML can stumble over."""
    return f"""<x-{field} onload="alert('&')">&lt;{field}</x-{field}>"""


def save_receipt(here: Settings, run: Run, verdict: Verdict, distributions: dict[str, str]) -> None:
    """Write the receipt of the environment that the run was made in."""
    generation = Generation(Installation(here.home).generations / run.record().generation)
    generation.path.mkdir(parents=True)
    receipt.save(
        generation,
        Receipt(
            generation="g", profile="p", lock="", python="", interpreter="", distributions=distributions,
            url="", commits=None, mixed_precision="no", accelerate_config="", default_config_path="",
            default_config="", smoke=None, train_step=verdict, seconds={}, written="",
        ),
    )  # fmt: skip


def poison(here: Settings, run: Run) -> list[str]:
    """Plant markup into every text of a run that somebody else can write; returns the fields."""
    fields = []

    def text(field: str) -> str:
        fields.append(field)
        return hostile(field)

    commits = Commits(text("kohya"), text("scripts"))
    record = msgspec.structs.replace(
        run.record(), name=text("name"), settings=text("settings-file"), model=text("model"),
        trainer=text("trainer"), expected_device=text("expected"), started=text("started"),
        profile=text("profile"), lock=text("lock"), accelerate_config=text("config"),
        packages={text("package"): text("version")}, commits=commits,
    )  # fmt: skip
    run.save(record)
    begin(run, total=30, device=text("device"))
    step = json.loads(step_line(31)) | {"rates": {text("rate"): 1e-4}}
    with run.steps_file.open("a") as file:
        file.write(json.dumps(step) + "\n")
    end(run, "failed", 31, f"ValueError: {text('error')}")
    run.settings.write_text(f"# {text('setting')}\n{run.settings.read_text()}")
    run.log.write_text(f"WARNING {text('log')}\n")
    (Path(record.base) / "prompts.txt").write_text(f"{text('prompt')}\n")
    run.rendered.mkdir()
    for name in ("with", "without"):
        Image.new("RGB", (8, 8)).save(run.rendered / f"{name}.png")
    (run.rendered / "prompt.txt").write_text(text("compared"))
    (run.output / f"a<b>&{text('lora').replace('/', '|')}.safetensors").touch()
    verdict = Verdict(True, text("verified-at"), "", text("verified-on"), ())
    save_receipt(here, run, verdict, {text("distribution"): text("distribution-version")})
    return fields


def test_nothing_that_comes_from_a_file_becomes_markup_and_all_of_it_is_shown(
    here: Settings, tmp_path: Path, run: Run
) -> None:
    clean = Tags(html_report.html(here, run))
    folder = tmp_path / "runs" / "<x-path>&"
    run.path.rename(folder)
    run = Run(folder)
    fields = poison(here, run)

    page = Tags(html_report.html(here, run))

    # "details" and "summary" hold the packages of the receipt.
    assert set(page.tags) <= set(clean.tags) | {"details", "summary"}
    assert page.attributes <= clean.attributes
    shown = page.text.replace("|", "/")
    assert [field for field in fields if hostile(field) not in shown] == []
    assert "<x-path>&" in shown


def test_what_a_run_names_is_escaped_once(here: Settings, run: Run) -> None:
    text = html_report.html(here, run)

    assert "a <b>square" in Tags(text).text
    assert "# <b>mine</b>" in Tags(text).text
    assert text.count("the &lt;second&gt; thing") == 1
    assert "&amp;lt;" not in text


def test_a_training_on_another_device_is_shown_as_a_failure(here: Settings, run: Run) -> None:
    begin(run, device="cuda:0")

    text = html_report.html(here, run)

    assert '<tr><th>training device</th><td class="fail">fail</td>' in text
    assert "cuda:0, 1 process, expected cpu" in text


def test_a_run_that_is_still_running_has_a_report_that_says_so(
    here: Settings, tmp_path: Path, run: Run
) -> None:
    run.ended_file.unlink()
    run.save(msgspec.structs.replace(run.record(), process=Process.of(os.getpid())))

    text = html_report.html(here, run)

    assert "running, at step 30 of 30" in text
    assert "The training was running when this was written." in text


def test_a_run_of_version_0_1_0_has_a_report(here: Settings, world: World) -> None:
    run = made_by_0_1_0(world.root, world.toml(), world.model)

    report = html_report.report(here, run.path)

    text = run.report.read_text()
    assert report.ok
    for expected in (
        "old_cat",
        "stopped after step 4 of 6",
        "resumed after step 2",
        "old and known",
        "3" * 40,
    ):
        assert expected in text


def test_a_warning_is_shown_once_and_without_the_colours_of_a_terminal(here: Settings, run: Run) -> None:
    run.log.write_text("\x1b[33mWARNING\x1b[0m   bad\nsteps: 1%\rUserWarning: worse\nWARNING   bad\nfine\n")

    text = html_report.html(here, run)

    assert "<pre>\nWARNING   bad\nUserWarning: worse</pre>" in text


def test_many_warnings_are_counted(here: Settings, run: Run) -> None:
    run.log.write_text("".join(f"WARNING {n}\n" for n in range(45)))

    text = html_report.html(here, run)

    assert "WARNING 39" in text
    assert "WARNING 40" not in text
    assert "and 5 more in the log" in text


def test_settings_versions_and_digests_are_in_it(here: Settings, run: Run) -> None:
    lora = run.output / "cat.safetensors"
    lora.write_bytes(b"weights")

    text = html_report.html(here, run)

    for expected in ("2.5.1", "ab" * 32, "cd" * 32, "networks.lora"):
        assert expected in text
    digest = subprocess.run(["sha256sum", lora], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digest in text


def test_the_steps_that_a_run_was_resumed_after_are_shown(here: Settings, run: Run) -> None:
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


def test_a_sample_that_is_drawn_again_moves_to_the_end(run: Run) -> None:
    again = run.samples / "cat_000010_00_20260102990000_7.png"
    Image.new("RGB", (8, 8), "white").save(again)

    assert html_report.samples(run)[-1].path == again


def test_a_step_that_drew_samples_does_not_flatten_the_others(here: Settings, run: Run) -> None:
    slow = json.loads(step_line(31)) | {"time": 1_700_000_000.0 + 500}
    with run.steps_file.open("a") as file:
        file.write(json.dumps(slow) + "\n")

    text = html_report.html(here, run)

    times = text[text.index("<h2>Step times</h2>") :]
    labels = re.findall(r'text-anchor="end">([^<]+)<', times)
    assert max(map(float, labels)) <= 2
    assert "cut off at three times the median" in times


def test_rates_that_are_equal_share_a_line_and_others_have_their_own(here: Settings, run: Run) -> None:
    rates = {"unet": 1e-4, "encoder one": 5e-5, "encoder two": 5e-5}
    lines = [json.dumps(json.loads(step_line(n)) | {"rates": rates}) + "\n" for n in range(1, 31)]
    run.steps_file.write_text("".join(lines))

    text = html_report.html(here, run)

    assert ">encoder one, encoder two</span>" in text
    assert ">unet</span>" in text


def test_several_processes_are_counted_beside_the_device(here: Settings, run: Run) -> None:
    begin(run, processes=2)

    assert "<b>cpu × 2</b>" in html_report.html(here, run)


@pytest.mark.parametrize(("ok", "shown"), [(True, "2026-01-01 on mps"), (False, "no")])
def test_the_environments_verification_is_shown_only_if_it_was_good(
    here: Settings, run: Run, ok: bool, shown: str
) -> None:
    save_receipt(here, run, Verdict(ok, "2026-01-01", "", "mps", ()), {"torch": "2.5.1"})

    text = html_report.html(here, run)

    assert f'<tr><th>verified</th><td class="value">{shown}</td></tr>' in text
    assert "<summary>all packages</summary>" in text
