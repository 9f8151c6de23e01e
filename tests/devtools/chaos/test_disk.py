from __future__ import annotations

import pytest

from devtools.chaos import disk
from devtools.chaos.testbed import REBUILD, CannotTry, Testbed
from kohya_mps.core.report import Status


def test_status_works_in_a_home_that_cannot_be_written(testbed: Testbed) -> None:
    assert testbed.python(REBUILD).code == 0
    try:
        with disk.not_writable(testbed.home.root):
            ran, report = testbed.report("status")
    except CannotTry as reason:
        pytest.skip(str(reason))

    assert "Traceback" not in ran.err
    assert report.status("environment") is Status.PASS


@pytest.mark.slow
def test_a_home_that_cannot_be_written_is_refused_and_left_as_it_is(stand_in: Testbed) -> None:
    try:
        row = disk.read_only(stand_in)
    except CannotTry as reason:
        pytest.skip(str(reason))
    assert row.survived == row.tries > 0, row.failures
