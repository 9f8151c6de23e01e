from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from devtools.docs import pages
from kohya_mps.core.settings import ROOT
from kohya_mps.known_failures import catalogue
from kohya_mps.known_failures.catalogue import Failure


def test_the_generated_pages_are_up_to_date() -> None:
    assert pages.stale() == [], "`nox -s pages` writes them anew"


def test_a_page_that_was_edited_by_hand_is_stale_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("made\nedited\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", {page: lambda: "made\n"})
    assert pages.stale() == ["docs/page.md"]

    assert [check.detail for check in pages.write().checks] == ["written"]

    assert page.read_text() == "made\n"
    assert pages.stale() == []
    assert [check.detail for check in pages.write().checks] == ["up to date"]


def test_every_known_failure_has_an_entry_under_a_heading_with_its_sources() -> None:
    _, *sections = re.split(r"^## .+\n", pages.troubleshooting(), flags=re.MULTILINE)
    entries = "".join(sections)

    assert len(sections) > 3
    assert entries.count("\nWhy: ") == entries.count("\nDo: ") == len(catalogue.known())
    assert "[bmaltais/kohya_ss#3281](https://github.com/bmaltais/kohya_ss/issues/3281)" in entries


def test_an_entry_names_the_commands_that_find_it() -> None:
    page = pages.troubleshooting()

    for failure in catalogue.known():
        entry = page[page.index(f"**{pages._markdown(failure.seen)}**") :].partition("\n\n")[0]
        named = {
            name
            for name in ("doctor", "preflight", "explain")
            if f"`invoke {name}`" in entry.splitlines()[-1]
        }
        ways = {"doctor": failure.environment, "preflight": failure.settings, "explain": failure.log}
        assert named == {name for name, found in ways.items() if found}


def test_marks_in_a_text_are_shown_as_they_are() -> None:
    shown = MarkdownIt().renderInline(pages._markdown("folders\n <repeats>_<name> *.png*, `a <b> *c*`"))

    assert shown == "folders &lt;repeats&gt;_&lt;name&gt; *.png*, <code>a &lt;b&gt; *c*</code>"


def test_the_page_of_commands_has_every_task_with_its_options_and_every_session() -> None:
    page = pages.commands()

    assert "| `-r, --resume` |" in page[page.index("## invoke train") :].partition("\n## ")[0]
    assert "| `-t, --[no-]train-step` |" in page
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert page.count("| `nox -s ") == len(re.findall(r"^@nox.session", text, re.MULTILINE))
    text = (ROOT / "tasks.py").read_text(encoding="utf-8")
    assert page.count("## invoke ") == len(re.findall(r"^@command", text, re.MULTILINE))


def test_sessions_stand_under_when_they_run() -> None:
    groups = pages._sessions()

    assert [("lint" in group, "coverage" in group, "bench" in group) for group in groups.values()] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip


def test_a_heading_of_the_data_counts_for_the_entries_below_it() -> None:
    text = "# ---- One ----\n\n- id: a\n- id: b\n# a comment\n# --- Two ---\n- id: c\n"

    assert pages._headings(text) == {"a": "One", "b": "One", "c": "Two"}


def test_a_failure_that_no_command_finds_says_so() -> None:
    failure = Failure("x", "seen", "cause", "remedy", ("somebody",), note="why")

    assert list(pages._entry(failure))[-1] == "*Not found by a command. Source: somebody.*"
