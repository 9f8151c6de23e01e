"""``invoke report``: one run in one HTML file that needs no other file and no network.

This module collects what the report shows; ``report.html.j2`` lays it out. The template escapes
every value, except the charts, which :mod:`.svg_chart` returns as markup.
"""

from __future__ import annotations

import base64
import itertools
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup

from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings
from kohya_mps.core.text import format_size, strip_ansi
from kohya_mps.install import lockfile, receipt
from kohya_mps.install.generations import Generation
from kohya_mps.install.receipt import Receipt

from . import live_view, outcome, runs, svg_chart
from .runs import Resumption, Run, State, Step, durations
from .svg_chart import Series

# The number of columns that can be compared at a glance.
_MOST_MOMENTS = 8
_MOST_WARNINGS = 40

# sd-scripts names samples NAME_STEP_PROMPT_TIME[_SEED].png, with e before an epoch's number.
_SAMPLE = re.compile(r"_(e?\d{6})_(\d{2})_\d{14}(?:_\d+)?\.png$")
_WARNING = re.compile(r"\bWARNING\b|Warning:")


class Fact(msgspec.Struct, frozen=True):
    """A value and its label."""

    label: str
    value: str


class Chart(msgspec.Struct, frozen=True):
    """A chart with its heading and the note below it."""

    title: str
    svg: Markup
    note: str = ""


class Picture(msgspec.Struct, frozen=True):
    """A picture inside the report: what it shows, and its bytes as a data URL."""

    description: str
    url: str

    @classmethod
    def read(cls, path: Path, description: str) -> Picture:
        """A PNG file."""
        data = base64.b64encode(path.read_bytes()).decode()
        return cls(description, f"data:image/png;base64,{data}")


class Sample(msgspec.Struct, frozen=True):
    """A picture that the trainer drew on the way: the step or epoch in its name, and its prompt's number."""

    moment: str
    prompt: int
    path: Path


class SampleRow(msgspec.Struct, frozen=True):
    """The samples of one prompt, one for each moment; None where there is no sample."""

    prompt: str
    pictures: tuple[Picture | None, ...]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the template shows."""

    name: str
    path: str
    started: str
    trainer: str
    model: str
    facts: tuple[Fact, ...]
    checks: tuple[Check, ...]
    charts: tuple[Chart, ...]
    compared: tuple[Picture, ...]
    compared_prompt: str
    moments: tuple[str, ...]
    samples: tuple[SampleRow, ...]
    settings_file: str
    settings_text: str
    versions: tuple[Fact, ...]
    packages: tuple[Fact, ...]
    warnings: tuple[str, ...]
    more_warnings: int
    running: bool


def report(settings: Settings, target: Path) -> Report:
    """Write the report of a run into the run's directory.

    Raises:
        UsageError: there is no run.
    """
    run = runs.find(target)
    write_atomic(run.report, html(settings, run).encode())
    check = Check("report", Status.PASS, f"{run.report} ({format_size(run.report.stat().st_size)})")
    return Report("Report", (check,), {"report": str(run.report), "run": str(run.path)})


def html(settings: Settings, run: Run) -> str:
    """The report of a run as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(page=_page(settings, run))


def _page(settings: Settings, run: Run) -> Page:
    record, steps = run.record(), run.steps()
    compared, compared_prompt = _compared(run)
    moments, rows = _sample_table(run)
    known = receipt.read(Generation(Installation(settings.home).generations / record.generation))
    warnings = _warnings(run)
    return Page(
        name=record.name,
        path=str(run.path),
        started=record.started,
        trainer=record.trainer,
        model=record.model,
        facts=tuple(_facts(run, steps)),
        checks=outcome.summarize(run).checks,
        charts=_charts(steps, record.resumed),
        compared=compared,
        compared_prompt=compared_prompt,
        moments=moments,
        samples=rows,
        settings_file=record.settings,
        settings_text=run.settings.read_text(encoding="utf-8", errors="replace"),
        versions=tuple(_versions(run, known)),
        packages=tuple(Fact(*item) for item in known.distributions.items()) if known else (),
        warnings=warnings[:_MOST_WARNINGS],
        more_warnings=max(0, len(warnings) - _MOST_WARNINGS),
        running=run.state() is State.RUNNING,
    )


def _facts(run: Run, steps: list[Step]) -> Iterable[Fact]:
    begun = run.begun()
    yield Fact("state", run.state())
    if steps:
        yield Fact("steps", f"{steps[-1].step}" + (f" of {begun.total}" if begun else ""))
        yield Fact("average loss", f"{steps[-1].average:.4f}")
        yield Fact("seconds per step", f"{live_view.pace(steps):.2f}")
        yield Fact("memory at the peak", format_size(max(step.memory for step in steps)))
        seconds = sum(durations(steps, run.record().resumed).values())
        yield Fact("time in steps", live_view.duration(seconds))
    if begun:
        yield Fact("device", begun.device + (f" × {begun.processes}" if begun.processes > 1 else ""))


def _charts(steps: list[Step], resumed: tuple[Resumption, ...]) -> tuple[Chart, ...]:
    losses = (
        Series("loss", [(s.step, s.loss) for s in steps], "two"),
        Series("average over an epoch", [(s.step, s.average) for s in steps], "one"),
    )
    after = ", ".join(str(resumption.step) for resumption in resumed)
    seconds = durations(steps, resumed)
    # A step that drew samples takes so long that the others would be a flat line.
    highest = 3 * statistics.median(seconds.values()) if seconds else None
    times = Series("seconds per step", list(seconds.items()), "one")
    return (
        Chart(
            "Loss", svg_chart.lines("loss by step", losses), f"resumed after step {after}" if resumed else ""
        ),
        Chart("Learning rate", svg_chart.lines("learning rate by step", _rates(steps))),
        Chart(
            "Step times",
            svg_chart.lines("seconds by step", [times], highest=highest),
            "cut off at three times the median" if seconds else "",
        ),
    )


def _rates(steps: list[Step]) -> list[Series]:
    """The learning rates; rates that are equal in all steps share a line."""
    together: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name in sorted({name for step in steps for name in step.rates}):
        points = tuple((s.step, s.rates[name]) for s in steps if name in s.rates)
        together.setdefault(points, []).append(name)
    styles = itertools.cycle(("one", "three", "two"))
    return [Series(", ".join(names), points, next(styles)) for points, names in together.items()]


def _compared(run: Run) -> tuple[tuple[Picture, ...], str]:
    """The two pictures of ``invoke test-lora`` and their prompt; nothing before it has run."""
    paths = {what: run.rendered / f"{what}.png" for what in ("without", "with")}
    if not all(path.is_file() for path in paths.values()):
        return (), ""
    prompt = (run.rendered / "prompt.txt").read_text(encoding="utf-8")
    return tuple(Picture.read(path, f"{what} the LoRA") for what, path in paths.items()), prompt


def samples(run: Run) -> list[Sample]:
    """The samples in the order in which they were drawn; of two for the same moment, the later one."""
    found: dict[tuple[str, int], Sample] = {}
    for path in sorted(run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns):
        if match := _SAMPLE.search(path.name):
            sample = Sample(match[1], int(match[2]), path)
            found.pop((sample.moment, sample.prompt), None)
            found[sample.moment, sample.prompt] = sample
    return list(found.values())


def _sample_table(run: Run) -> tuple[tuple[str, ...], tuple[SampleRow, ...]]:
    """The moments, picked evenly when there are many, and a row of pictures for each prompt."""
    drawn = {(s.moment, s.prompt): s.path for s in samples(run)}
    moments = list(dict.fromkeys(moment for moment, _ in drawn))
    if len(moments) > _MOST_MOMENTS:
        last = len(moments) - 1
        moments = [moments[i * last // (_MOST_MOMENTS - 1)] for i in range(_MOST_MOMENTS)]
    prompts = [prompt.partition(" --")[0] for prompt in run.prompts()]

    def picture(moment: str, number: int) -> Picture | None:
        path = drawn.get((moment, number))
        return Picture.read(path, f"{_moment(moment)}, prompt {number}") if path else None

    rows = tuple(
        SampleRow(
            prompts[number] if number < len(prompts) else f"prompt {number}",
            tuple(picture(moment, number) for moment in moments),
        )
        for number in sorted({prompt for _, prompt in drawn})
    )
    return tuple(map(_moment, moments)), rows


def _moment(moment: str) -> str:
    return f"epoch {int(moment[1:])}" if moment.startswith("e") else f"step {int(moment)}"


def _versions(run: Run, known: Receipt | None) -> Iterable[Fact]:
    record, lora = run.record(), run.lora()
    yield Fact("profile", record.profile)
    yield Fact("environment", record.generation)
    yield Fact("lock (SHA-256)", record.lock)
    yield Fact("accelerate configuration (SHA-256)", record.accelerate_config)
    for name, version in record.packages.items():
        yield Fact(name, version)
    if record.commits:
        yield Fact("kohya_ss", record.commits.kohya_ss)
        yield Fact("sd-scripts", record.commits.sd_scripts)
    if lora:
        yield Fact("LoRA", str(lora))
        yield Fact("LoRA (SHA-256)", lockfile.digest(lora))
    if known:
        verified = known.train_step
        yield Fact("verified", f"{verified.at} on {verified.device}" if verified and verified.ok else "no")


def _warnings(run: Run) -> tuple[str, ...]:
    """The warnings in the log, each once, as they stood on a terminal."""
    log = run.log.read_text(encoding="utf-8", errors="replace") if run.log.is_file() else ""
    lines = (
        line.rpartition("\r")[2].strip() for line in strip_ansi(log).split("\n") if _WARNING.search(line)
    )
    return tuple(dict.fromkeys(lines))
