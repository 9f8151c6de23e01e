from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from devtools.rehearsal import record
from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Finding, Kind
from tests.support.rehearsal_records import FAILED, GOOD


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    full = replace(FAILED, findings=(Finding(Kind.MIXED, "add.Tensor", "a.py:1", 2, "RuntimeError: x"),))

    record.write(tmp_path / "record.json", full)

    assert record.read(tmp_path / "record.json") == full


def test_operators_are_counted_by_how_they_are_served() -> None:
    assert GOOD.count(Served.KERNEL) == 1
    assert GOOD.count(Served.COMPOSITE) == 1
    assert GOOD.count(Served.MISSING) == 0


def test_no_file_is_left_of_a_record_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    record.write(tmp_path / "records" / "record.json", GOOD)
    assert [path.name for path in (tmp_path / "records").iterdir()] == ["record.json"]
