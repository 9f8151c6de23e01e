from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from devtools.chaos import faults
from devtools.chaos.testbed import CannotTry, NotSurvived, Row, Testbed
from kohya_mps.core import settings
from kohya_mps.core.report import Status


@pytest.mark.parametrize("arguments", [["--kills", "x"], ["--only", "earthquake"], ["--unknown"]])
def test_wrong_arguments_are_refused_with_what_can_be_typed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        faults.parse_options(arguments)
    assert "nox -s chaos --" in capsys.readouterr().err


def test_all_faults_are_tried_unless_some_are_named() -> None:
    assert faults.parse_options([]) == faults.ChaosOptions(kills=60, pairs=20, only=())
    options = faults.parse_options(["--kills", "6", "--pairs", "3", "--only", "clock", "--only", "pairs"])
    assert options == faults.ChaosOptions(kills=6, pairs=3, only=("clock", "pairs"))


@pytest.mark.parametrize("kills", [0, 1, 6, 7])
def test_the_kills_are_shared_between_a_fresh_install_and_a_rebuild(kills: int) -> None:
    table = faults.table(faults.ChaosOptions(kills=kills, pairs=2))
    runs = [table[name].run for name in ("kill-fresh", "kill-rebuild")]
    counts = [run.keywords["count"] for run in runs if isinstance(run, partial)]
    assert len(counts) == 2
    assert sum(counts) == kills
    assert 0 <= counts[0] - counts[1] <= 1


def test_a_fault_that_this_machine_does_not_allow_is_skipped_with_the_reason(testbed: Testbed) -> None:
    def fault(_testbed: Testbed) -> Row:
        raise CannotTry("mounting needs root")

    check = faults.attempt("disk", faults.Fault(fault), testbed).check()
    assert (check.status, check.detail) == (Status.SKIP, "mounting needs root")


def test_a_preparation_that_fails_is_a_failure_and_the_next_fault_begins_anew(testbed: Testbed) -> None:
    def fault(broken: Testbed) -> Row:
        broken.home.root.mkdir()
        raise NotSurvived("no installation")

    check = faults.attempt("lock", faults.Fault(fault), testbed).check()
    assert check.status is Status.FAIL
    assert "no installation" in check.detail
    assert not testbed.home.root.exists()


def test_the_session_tries_the_selected_faults_on_their_testbeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "SANDBOX", tmp_path / "nox" / "install")
    tried: list[tuple[str, str]] = []

    def fault(name: str) -> Callable[[Testbed], Row]:
        def run(testbed: Testbed) -> Row:
            tried.append((name, testbed.lock.stem))
            assert (testbed.project / "tasks.py").is_file()
            return Row(name, 2, 1 if name == "small" else 2, "everything")

        return run

    known = {
        "real": faults.Fault(fault("real")),
        "small": faults.Fault(fault("small"), small=True),
        "other": faults.Fault(fault("other")),
    }
    monkeypatch.setattr(faults, "table", lambda _options: known)
    report = faults.run(settings.load(), faults.ChaosOptions(only=("real", "small")))
    assert tried == [("real", settings.load().profile.lock), ("small", "small")]
    assert [check.status for check in report.checks] == [Status.PASS, Status.FAIL]
    assert report.summary[-1] == "3 of 4 tries survived."
    assert not list((tmp_path / "nox").iterdir())
