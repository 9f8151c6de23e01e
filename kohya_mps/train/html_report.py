"""``invoke report``: one run in one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import itertools
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import msgspec

from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import stream
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import Settings
from kohya_mps.core.text import format_size, strip_ansi
from kohya_mps.install import accelerate_launch, lockfile, receipt
from kohya_mps.install.generations import Generation
from kohya_mps.install.setup import installed

from . import live_view, runs, start, svg_chart
from .runs import Resumption, Run, State, Step, durations
from .svg_chart import Series

# As many columns as can be compared at a glance; a long run's samples are picked evenly.
_MOST_MOMENTS = 8
_MOST_WARNINGS = 40

# sd-scripts names samples NAME_STEP_PROMPT_TIME[_SEED].png, with e before an epoch's number.
_SAMPLE = re.compile(r"_(e?\d{6})_(\d{2})_\d{14}(?:_\d+)?\.png$")
_WARNING = re.compile(r"\bWARNING\b|Warning:")

_STYLE = """
:root { --ink: #1d2330; --soft: #667085; --line: #e3e6ec; --paper: #fff; --card: #f7f8fa;
  --one: #2563eb; --two: #9db8f5; --three: #d97706; --good: #15803d; --bad: #b91c1c; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #2b3240;
  --paper: #12161f; --card: #1a202c; --one: #7aa2ff; --two: #34508f; --three: #f0b254; --good: #4ade80;
  --bad: #f87171; --warn: #fbbf24; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }
main { max-width: 960px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 34px 0 8px; }
.where, .none, .note { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(118px, 1fr)); gap: 10px; margin: 20px 0; }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.fact b { display: block; font-size: 17px; white-space: nowrap; } .fact span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
svg text { fill: var(--soft); font-size: 11px; } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; }
polyline.one { stroke: var(--one); stroke-width: 2.4; } polyline.two { stroke: var(--two); stroke-width: 1; }
polyline.three { stroke: var(--three); }
.legend { margin: 4px 0 0; font-size: 13px; color: var(--soft); } .key { margin-right: 18px; }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; margin-right: 6px; vertical-align: middle; }
.key.one::before { background: var(--one); } .key.two::before { background: var(--two); }
.key.three::before { background: var(--three); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.value { overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
.samples td { border: 0; padding: 4px; } .samples th { border: 0; padding: 4px; max-width: 150px; font-size: 13px; }
.samples img { display: block; width: 128px; border-radius: 6px; background: var(--card); image-rendering: auto; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: 13px; } summary { cursor: pointer; font-weight: 600; margin: 8px 0; }
.pass { color: var(--good); } .fail { color: var(--bad); } .warn { color: var(--warn); } .skip { color: var(--soft); }
"""


class Sample(msgspec.Struct, frozen=True):
    """A picture that the trainer drew on the way: at which step or epoch, from which prompt."""

    moment: str
    prompt: int
    path: Path


def report(settings: Settings, place: Path) -> Report:
    """Write the report of a run into its directory."""
    run = runs.find(place)
    write_atomic(run.report, html(settings, run).encode())
    row = Check("report", Status.PASS, f"{run.report} ({format_size(run.report.stat().st_size)})")
    return Report("Report", (row,), {"report": str(run.report), "run": str(run.path)})


def html(settings: Settings, run: Run) -> str:
    """The report's text."""
    record, steps, concluded = run.record(), run.steps(), start.summarize(run)
    sections = [
        _head(run, steps),
        _checks(concluded.checks),
        _curves(steps, record.resumed),
        _rendered(run),
        _samples(run),
        _settings(run),
        _versions(settings, run),
        _warnings(run),
    ]
    title = escape(f"{record.name}: training report")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(run: Run, steps: list[Step]) -> str:
    record, begun, state = run.record(), run.begun(), run.state()
    facts = [("state", str(state))]
    if steps:
        total = f" of {begun.total}" if begun else ""
        facts += [
            ("steps", f"{steps[-1].step}{total}"),
            ("average loss", f"{steps[-1].average:.4f}"),
            ("seconds per step", f"{live_view.pace(steps):.2f}"),
            ("memory at the peak", format_size(max(step.memory for step in steps))),
            ("time in steps", live_view.duration(sum(durations(steps, record.resumed).values()))),
        ]
    if begun:
        processes = f" × {begun.processes}" if begun.processes > 1 else ""
        facts.append(("device", begun.device + processes))
    shown = "".join(
        f"<div class=fact><b>{escape(value)}</b><span>{name}</span></div>" for name, value in facts
    )
    return (
        f"<h1>{escape(record.name)}</h1><p class=where>{escape(str(run.path))}<br>"
        f"began {escape(record.started)} (UTC), {escape(record.trainer)}, {escape(record.model)}</p>"
        f"<div class=facts>{shown}</div>"
    )


def _checks(checks: Iterable[Check]) -> str:
    rows = "".join(
        f"<tr><th>{escape(c.name)}</th><td class={c.status}>{c.status}</td><td class=value>{escape(c.detail)}"
        + (f"<br>→ {escape(c.fix)}" if c.fix else "")
        + "</td></tr>"
        for c in checks
    )
    return f"<table>{rows}</table>"


def _curves(steps: list[Step], resumed: tuple[Resumption, ...]) -> str:
    losses = svg_chart.lines(
        "loss by step",
        [
            Series("loss", [(s.step, s.loss) for s in steps], "two"),
            Series("average over an epoch", [(s.step, s.average) for s in steps], "one"),
        ],
    )
    rates = svg_chart.lines("learning rate by step", _rates(steps))
    timed = durations(steps, resumed)
    # A step that drew samples would hide all others.
    highest = 3 * statistics.median(timed.values()) if timed else None
    times = svg_chart.lines(
        "seconds by step",
        [Series("seconds per step", list(timed.items()), "one")],
        highest=highest,
    )
    after = ", ".join(str(again.step) for again in resumed)
    note = f"<p class=note>resumed after step {after}</p>" if resumed else ""
    cut = "<p class=note>cut off at three times the median</p>" if timed else ""
    return f"<h2>Loss</h2>{losses}{note}<h2>Learning rate</h2>{rates}<h2>Step times</h2>{times}{cut}"


def _rates(steps: list[Step]) -> list[Series]:
    """The learning rates; those that are the same throughout share a line."""
    together: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name in sorted({name for step in steps for name in step.rates}):
        points = tuple((s.step, s.rates[name]) for s in steps if name in s.rates)
        together.setdefault(points, []).append(name)
    styles = itertools.cycle(("one", "three", "two"))
    return [Series(", ".join(names), points, next(styles)) for points, names in together.items()]


def _rendered(run: Run) -> str:
    pictures = [(what, run.rendered / f"{what}.png") for what in ("without", "with")]
    if not all(path.is_file() for _, path in pictures):
        return ""
    cells = "".join(
        f"<td>{_image(path, f'{what} the LoRA')}<br>{what} the LoRA</td>" for what, path in pictures
    )
    prompt = (run.rendered / "prompt.txt").read_text(encoding="utf-8")
    return f"<h2>The LoRA in diffusers</h2><table class=samples><tr>{cells}</tr></table><p class=note>{escape(prompt)}</p>"


def samples(run: Run) -> list[Sample]:
    """The samples in the order in which they were drawn; of two for the same moment, the later."""
    found: dict[tuple[str, int], Sample] = {}
    for path in sorted(run.samples.glob("*.png"), key=lambda path: path.stat().st_mtime_ns):
        if named := _SAMPLE.search(path.name):
            sample = Sample(named[1], int(named[2]), path)
            found.pop((sample.moment, sample.prompt), None)
            found[sample.moment, sample.prompt] = sample
    return list(found.values())


def _samples(run: Run) -> str:
    drawn = {(s.moment, s.prompt): s for s in samples(run)}
    if not drawn:
        return ""
    moments = list(dict.fromkeys(moment for moment, _ in drawn))
    if len(moments) > _MOST_MOMENTS:
        last = len(moments) - 1
        moments = [moments[i * last // (_MOST_MOMENTS - 1)] for i in range(_MOST_MOMENTS)]
    prompts = [prompt.partition(" --")[0] for prompt in run.prompts()]
    head = "".join(f"<th>{_moment(moment)}</th>" for moment in moments)
    rows = []
    for number in sorted({prompt for _, prompt in drawn}):
        cells = "".join(
            f"<td>{_image(drawn[moment, number].path, f'{_moment(moment)}, prompt {number}')}</td>"
            if (moment, number) in drawn
            else "<td></td>"
            for moment in moments
        )
        rows.append(
            f"<tr><th>{escape(prompts[number] if number < len(prompts) else f'prompt {number}')}</th>{cells}</tr>"
        )
    grid = f"<table class=samples><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>Samples</h2><div class=scroll>{grid}</div>"


def _moment(moment: str) -> str:
    return f"epoch {int(moment[1:])}" if moment.startswith("e") else f"step {int(moment)}"


def _image(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(what)}" title="{escape(what)}" src="data:image/png;base64,{data}">'


def _settings(run: Run) -> str:
    text = run.settings.read_text(encoding="utf-8", errors="replace")
    where = escape(run.record().settings)
    return f"<h2>Settings</h2><details open><summary>{where}</summary><pre>{escape(text)}</pre></details>"


def _versions(settings: Settings, run: Run) -> str:
    record, lora = run.record(), run.lora()
    facts = {
        "profile": record.profile,
        "environment": record.generation,
        "lock (SHA-256)": record.lock,
        "accelerate configuration (SHA-256)": record.accelerate_config,
        **record.packages,
    }
    if record.commits:
        facts |= {"kohya_ss": record.commits.kohya_ss, "sd-scripts": record.commits.sd_scripts}
    if lora:
        facts |= {"LoRA": str(lora), "LoRA (SHA-256)": lockfile.digest(lora)}
    known = receipt.read(Generation(Installation(settings.home).generations / record.generation))
    everything = ""
    if known:
        verified = known.train_step
        facts["verified"] = f"{verified.at} on {verified.device}" if verified and verified.ok else "no"
        everything = f"<details><summary>all packages</summary>{_table(known.distributions)}</details>"
    return f"<h2>Versions and digests</h2>{_table(facts)}{everything}"


def _table(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td class=value>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _warnings(run: Run) -> str:
    text = run.log.read_text(encoding="utf-8", errors="replace") if run.log.is_file() else ""
    found = [
        line.rpartition("\r")[2].strip() for line in strip_ansi(text).split("\n") if _WARNING.search(line)
    ]
    unique = list(dict.fromkeys(found))
    shown = "\n".join(unique[:_MOST_WARNINGS])
    more = (
        f"<p class=note>and {len(unique) - _MOST_WARNINGS} more in the log</p>"
        if len(unique) > _MOST_WARNINGS
        else ""
    )
    body = f"<pre>{escape(shown)}</pre>{more}" if unique else "<p class=none>none in the log</p>"
    state = (
        ""
        if run.state() is not State.RUNNING
        else "<p class=note>The training was running when this was written.</p>"
    )
    return f"<h2>Warnings</h2>{body}{state}"


def tensorboard(settings: Settings, place: Path, port: int) -> int:
    """Serve the logs of a run, or of all runs of a project, until Ctrl-C; only to this machine."""
    path = Path(os.path.abspath(place))
    logs = path / runs.RUNS if (path / runs.RUNS).is_dir() else runs.find(place).tensorboard
    generation = installed(Installation(settings.home))
    served = [str(generation.python), "-m", "tensorboard.main", "--logdir", str(logs)]
    say(f"http://127.0.0.1:{port}/ shows {logs}; Ctrl-C ends it")
    return stream(
        [*served, "--host", "127.0.0.1", "--port", str(port)], env=accelerate_launch.environ(generation)
    ).returncode
