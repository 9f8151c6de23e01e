from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.bench import comparison
from devtools.bench.comparison import Comparison
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.report import Status


@pytest.mark.parametrize(
    ("medians", "status"), [((1.3, 1.0), Status.PASS), ((1.31, 1.0), Status.FAIL), ((1.0, 0.0), Status.FAIL)]
)
def test_a_ratio_above_the_limit_fails(medians: tuple[float, float], status: Status) -> None:
    assert Comparison("ours", "bare", medians, "s", 1.3).check().status is status


def test_both_sides_are_measured_by_turns_and_the_first_round_does_not_count() -> None:
    turns: list[str] = []
    ours, bare = iter([100.0, 1.0, 5.0, 3.0]), iter([100.0, 2.0, 2.0, 4.0])

    def side(name: str, values: Iterator[float]) -> float:
        turns.append(name)
        return next(values)

    measured = comparison.medians(3, lambda: side("ours", ours), lambda: side("bare", bare))
    assert measured == (3.0, 2.0)
    assert turns == ["ours", "bare"] * 4


def test_a_command_that_fails_is_an_error_with_its_last_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the reason')"]
    with pytest.raises(StepFailed, match=r"ended with 1: the reason"):
        comparison.run_command(command, cwd=tmp_path)
    assert comparison.run_command([sys.executable, "-c", ""]).returncode == 0


def test_the_tool_that_people_type_comes_before_the_sessions_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "ROOT", tmp_path)
    assert comparison.tool("invoke") == str(Path(sys.prefix) / "bin" / "invoke")
    installed = tmp_path / ".venv" / "bin" / "invoke"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert comparison.tool("invoke") == str(installed)
