from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from devtools.bench import parts
from devtools.bench.comparison import Comparison
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Report, Status
from kohya_mps.core.settings import Settings
from tests.support.installs import make_settings

GOOD = Comparison("ours", "bare", (1.0, 1.0), "s", 1.1)


@pytest.fixture
def bench_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scratch files and figures go to the test's own directory."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "_SCRATCH", tmp_path / "scratch")
    return tmp_path / "bench.json"


def good(_settings: Settings, scratch: Path, _times: int) -> list[Comparison]:
    (scratch / "left").mkdir()  # each part has a directory of its own
    return [GOOD]


def slow(_settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    (scratch / "left").mkdir()
    return [Comparison("ours", "bare", (float(times), 1.0), "s", 1.1)]


def failing(_settings: Settings, _scratch: Path, _times: int) -> list[Comparison]:
    raise StepFailed("uv pip … ended with 2", "look at its output")


def broken(_settings: Settings, _scratch: Path, _times: int) -> list[Comparison]:
    raise FileNotFoundError("bench.safetensors")


def missing(_settings: Settings, _scratch: Path, _times: int) -> list[Comparison]:
    raise UsageError("there is no web page", "`invoke setup --gui` installs it")


KNOWN = {"good": good, "slow": slow, "failing": failing, "broken": broken, "missing": missing}


def run(tmp_path: Path, *names: str) -> Report:
    return parts.run(make_settings(tmp_path / "home"), parts.BenchOptions(names, 3), KNOWN)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("failing", "uv pip … ended with 2"), ("broken", "FileNotFoundError: bench.safetensors")],
)
def test_a_part_that_fails_is_a_row_and_the_others_are_measured(
    tmp_path: Path, bench_json: Path, name: str, reason: str
) -> None:
    report = run(tmp_path, "good", name, "slow")
    assert not report.ok
    assert [check.status for check in report.checks] == [Status.PASS, Status.FAIL, Status.FAIL]
    assert (report.checks[1].name, report.checks[1].detail) == (name, reason)
    assert [row["medians"] for row in msgspec.json.decode(bench_json.read_bytes())] == [[1, 1], [3, 1]]


def test_a_part_whose_prerequisites_are_missing_is_skipped_with_what_brings_them(
    tmp_path: Path, bench_json: Path
) -> None:
    report = run(tmp_path, "missing", "good")
    assert report.ok
    assert report.checks[0].status is Status.SKIP
    assert report.checks[0].detail == (
        "cannot be measured here: there is no web page; `invoke setup --gui` installs it"
    )
    assert report.checks[1].status is Status.PASS


def test_each_figure_is_printed_as_soon_as_it_is_measured(
    tmp_path: Path, bench_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "good", "failing")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "measuring good",
        "  ours / bare: 1.00 against 1.00 s: 1.00 x, at most 1.1 x",
    ]


def test_nothing_is_left_of_the_scratch_directory(tmp_path: Path, bench_json: Path) -> None:
    run(tmp_path, "good", "broken")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_every_part_is_measured_unless_some_are_named() -> None:
    assert parts.parse_options([]) == parts.BenchOptions(tuple(parts.PARTS), 5)
    assert parts.parse_options(["--only", "list", "--only", "gui", "--times", "1"]) == parts.BenchOptions(
        ("list", "gui"), 1
    )
