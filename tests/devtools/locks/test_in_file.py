from __future__ import annotations

from pathlib import Path

import pytest

from devtools.locks import in_file
from kohya_mps.core.errors import UsageError
from tests.support.lock_files import write_in_file


def test_a_lock_comes_after_the_one_that_it_holds_to(constraints: Path) -> None:
    write_in_file(constraints, "plain", name="zebra")
    write_in_file(constraints, "-c zebra.txt", "middle", name="ape")
    assert in_file.lock_names() == ["zebra", "ape"]


def test_locks_are_selected_by_name_and_all_of_them_without_one(constraints: Path) -> None:
    write_in_file(constraints, "plain")
    write_in_file(constraints, "plain", name="gui")
    assert in_file.select(["gui"]) == ("gui",)
    assert in_file.select([]) == ("gui", "train")
    with pytest.raises(UsageError, match=r"there is no lock 'gone'.*") as refusal:
        in_file.select(["train", "gone"])
    assert refusal.value.fix == "accepted: gui, train"


def test_requirements_are_those_of_included_files_too_and_overrides_only_ones_own(constraints: Path) -> None:
    write_in_file(constraints, "middle>=1  # why", "# override: triton>3", name="tools")
    write_in_file(
        constraints, "-r tools.in", "plain[more]==1.0 ; sys_platform == 'darwin'", "# override: plain>1"
    )
    found = [str(requirement) for requirement in in_file.requirements("train")]
    assert found == ["middle>=1", 'plain[more]==1.0; sys_platform == "darwin"']
    assert [str(override) for override in in_file.overrides("train")] == ["plain>1"]


def test_the_cutoff_of_an_included_file_does_not_count(constraints: Path) -> None:
    (constraints / "tools.in").write_text("# exclude-newer: 2020-01-01\nmiddle\n", encoding="utf-8")
    path = write_in_file(constraints, "-r tools.in")
    assert [line for line in in_file.inputs(path) if "exclude-newer" in line] == ["exclude-newer 2026-02-20"]


def test_a_cutoff_replaces_the_one_in_the_text_and_nothing_else(constraints: Path) -> None:
    path = write_in_file(constraints, "plain")
    text = in_file.with_cutoff(in_file.read(path), "2026-03-01")
    assert in_file.cutoff_of(path, text) == "2026-03-01"
    assert text.replace("2026-03-01", "2026-02-20") == in_file.read(path)


@pytest.mark.parametrize("cutoff", ["2026-02-31", "20260301", "yesterday", ""])
def test_a_cutoff_that_is_not_a_day_is_refused(cutoff: str) -> None:
    with pytest.raises(UsageError, match=r"is not a day.*"):
        in_file.with_cutoff("# exclude-newer: 2026-02-20\n", cutoff)


def test_an_in_file_without_a_cutoff_or_with_a_line_that_is_no_requirement_is_refused(
    constraints: Path,
) -> None:
    path = constraints / "train.in"
    path.write_text("plain ==== 1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="exclude-newer"):
        in_file.cutoff_of(path, in_file.read(path))
    with pytest.raises(UsageError, match="is not a requirement"):
        in_file.requirements("train")
