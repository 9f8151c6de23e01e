"""``nox -s bench``: what this project costs over the bare tools, as ratios measured in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from devtools.sandbox import SANDBOX
from kohya_mps.core.errors import KohyaError, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import ROOT, Settings

from . import installing, page, training
from .comparison import Comparison, Measure

PARTS: dict[str, Measure] = {
    "venv": installing.venv,
    "payload": installing.payload,
    "nothing": installing.nothing_to_do,
    "train_step": training.train_step,
    "list": installing.list_of_tasks,
    "generation": installing.second_generation,
    "training": training.training,
    "rehearse": training.rehearsal,
    "gui": page.until_it_answers,
}

# On the disk that the environments are on: links from uv's cache do not cross file systems.
_SCRATCH = SANDBOX.parent


class BenchOptions(msgspec.Struct, frozen=True):
    """What is measured, and how often each side runs."""

    parts: tuple[str, ...]
    times: int


def parse_options(arguments: Sequence[str]) -> BenchOptions:
    """The options of ``nox -s bench``."""
    parser = posargs.parser("bench", "Compare with the bare tools.")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="measure this part; repeatable")
    parser.add_argument("--times", type=int, default=5, help="how often each side runs")
    parsed = parser.parse_args(arguments)
    return BenchOptions(tuple(parsed.only or PARTS), parsed.times)


def run(settings: Settings, options: BenchOptions, known: Mapping[str, Measure] = PARTS) -> Report:
    """Measure the selected parts and report the ratios.

    A part that fails is a row that fails, and the others are measured all the same. A part whose
    prerequisites are missing on this machine is skipped, with what brings them.

    Args:
        settings: the installation that is compared, and whose profile is installed.
        options: which parts.
        known: how each part is measured.
    """
    comparisons: list[Comparison] = []
    checks: list[Check] = []
    _SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=_SCRATCH) as directory:
        for name in options.parts:
            say(f"measuring {name}")
            scratch = Path(directory) / name
            scratch.mkdir()
            measured, rows = _measure(name, known[name], settings, scratch, options.times)
            for row in rows:
                say(f"  {row.name}: {row.detail}")  # at once: the next part may take minutes
            comparisons += measured
            checks += rows
    data = [{**msgspec.structs.asdict(each), "ratio": round(each.ratio, 3)} for each in comparisons]
    write_atomic(ROOT / "bench.json", msgspec.json.format(msgspec.json.encode(data)))
    return Report("Bench", tuple(checks), {"rows": data})


def _measure(
    name: str, measure: Measure, settings: Settings, scratch: Path, times: int
) -> tuple[list[Comparison], list[Check]]:
    try:
        comparisons = measure(settings, scratch, times)
    except UsageError as error:
        reason = f"{error.what}; {error.fix}" if error.fix else error.what
        return [], [Check(name, Status.SKIP, f"cannot be measured here: {reason}")]
    except KohyaError as error:
        return [], [Check(name, Status.FAIL, error.what, error.fix)]
    except Exception as error:
        # Whatever it was: minutes of other figures must not be lost with this part.
        return [], [Check(name, Status.FAIL, f"{type(error).__name__}: {error}")]
    return comparisons, [comparison.check() for comparison in comparisons]
