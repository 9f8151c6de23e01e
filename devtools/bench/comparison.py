"""One comparison with the bare tools, and what measuring it needs."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed
from kohya_mps.core.process import ProcessResult, clean_environ, stream
from kohya_mps.core.report import Check
from kohya_mps.core.settings import ROOT, Settings


class Comparison(msgspec.Struct, frozen=True):
    """One piece of work: medians of both sides, in ``unit``, and the ratio that is allowed."""

    work: str
    against: str
    medians: tuple[float, ...]
    unit: str
    at_most: float

    @property
    def ours(self) -> float:
        """What the work costs with this project."""
        return self.medians[0]

    @property
    def bare(self) -> float:
        """What it costs with the bare tools."""
        return self.medians[1]

    @property
    def ratio(self) -> float:
        """Ours divided by bare."""
        return self.ours / self.bare if self.bare else float("inf")

    def check(self) -> Check:
        """The comparison as a row of the report; it fails above the limit."""
        detail = f"{self.ours:.2f} against {self.bare:.2f} {self.unit}: {self.ratio:.2f} x, at most {self.at_most:g} x"
        return Check.of(f"{self.work} / {self.against}", self.ratio <= self.at_most, detail)


#: Measures with these settings, in this scratch directory, each side this many times. Raises
#: :class:`UsageError` when something that it needs is not there.
Measure = Callable[[Settings, Path, int], list[Comparison]]


def medians(times: int, *sides: Callable[[], float]) -> tuple[float, ...]:
    """The median of each side, measured by turns; the first round warms the caches and does not count."""
    rounds = [[side() for side in sides] for _ in range(times + 1)][1:]
    return tuple(statistics.median(column) for column in zip(*rounds, strict=True))


def run_command(
    command: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path = ROOT
) -> ProcessResult:
    """Run a command to its end without showing its output.

    Raises:
        StepFailed: it ended with another exit code than 0.
    """
    done = stream(command, cwd=cwd, env=env or clean_environ(), on_output=lambda _: None)
    if done.returncode:
        raise StepFailed(f"{' '.join(command[:4])} … ended with {done.returncode}: {done.last_line}")
    return done


def tool(name: str) -> str:
    """The tool in ``.venv``, which is what people type; where there is none, this session's."""
    in_venv = ROOT / ".venv" / "bin" / name
    return str(in_venv if in_venv.exists() else Path(sys.prefix) / "bin" / name)


def own_environ(**variables: str) -> dict[str, str]:
    """The variables for our own front ends: those of a person's shell, and these."""
    return {**os.environ, **variables}
