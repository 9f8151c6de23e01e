from __future__ import annotations

import json

import pytest

from kohya_mps.core.report import Check, Report, Status, say, show, to_json


def make(*statuses: Status) -> Report:
    return Report("Title", tuple(Check(f"check {s}", s, f"found {s}", f"fix for {s}") for s in statuses))


def test_warnings_and_skipped_checks_are_good_and_a_failure_is_not() -> None:
    assert make(Status.PASS, Status.WARN, Status.SKIP).ok
    assert not make(Status.PASS, Status.FAIL).ok
    assert make().ok


def test_a_check_that_passes_has_no_fix() -> None:
    assert Check.of("n", True, "d", "f") == Check("n", Status.PASS, "d", "")
    assert Check.of("n", False, "d", "f") == Check("n", Status.FAIL, "d", "f")


def test_a_report_grows_without_being_changed() -> None:
    first = make(Status.PASS)
    assert not first.plus([Check("late", Status.FAIL, "")]).ok
    assert first.ok


def test_json_has_every_field_and_what_the_command_adds() -> None:
    data = json.loads(to_json(Report("T", (Check("n", Status.WARN, "Größe", "f"),), {"device": None})))
    assert data == {
        "ok": True,
        "checks": [{"name": "n", "status": "warn", "detail": "Größe", "fix": "f"}],
        "device": None,
    }


def test_the_table_names_checks_and_lists_only_the_fixes_that_are_needed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(make(Status.PASS, Status.WARN, Status.FAIL, Status.SKIP))
    printed = capsys.readouterr().out
    for status in Status:
        assert f"found {status}" in printed
    assert "fix for warn" in printed
    assert "fix for fail" in printed
    assert "fix for pass" not in printed
    assert "fix for skip" not in printed


def test_long_paths_commands_and_brackets_come_through_unharmed(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/home/" + "/".join(["directory"] * 40)
    fix = f"`rm -r '{path}'` [bold]not markup[/bold]"
    show(Report("", (Check("n", Status.FAIL, "[red]x", fix),), summary=(f"next: {path}",)))
    printed = capsys.readouterr().out
    assert fix in printed
    assert "[red]x" in printed
    assert f"next: {path}\n" in printed


def test_a_table_in_a_file_is_as_wide_as_paths_need(capsys: pytest.CaptureFixture[str]) -> None:
    detail = "/home/" + "d" * 130
    show(Report("Title", (Check("n", Status.PASS, detail),)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Title"
    assert any(detail in line for line in lines)
    assert max(map(len, lines)) <= 160


def test_a_report_without_checks_is_its_title_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    show(Report("Nothing to do", (), summary=("so it is",)))
    assert capsys.readouterr().out == "Nothing to do\nso it is\n"


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("working")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "working\n"
