from __future__ import annotations

import pytest

from devtools.chaos.testbed import REBUILD, Attempts, NotSurvived, Testbed, expect, processes_of
from kohya_mps.core.report import Status
from kohya_mps.install import generations


def test_leftovers_of_a_kill_are_seen(testbed: Testbed) -> None:
    """The session would be worth nothing if it overlooked them."""
    testbed.home.state.mkdir(parents=True)
    for path in (testbed.home.state / ".receipt.json.new", testbed.temporary / "something"):
        path.touch()
        with pytest.raises(NotSurvived, match="temporary files"):
            testbed.assert_no_leftovers()
        path.unlink()
    (testbed.home.generations / "half").mkdir(parents=True)
    with pytest.raises(NotSurvived, match="half-built"):
        testbed.assert_no_leftovers()
    (testbed.home.generations / "half").rmdir()
    process = testbed.start_python("import time; time.sleep(60)")
    try:
        while not processes_of(testbed.home):
            assert process.poll() is None
        with pytest.raises(NotSurvived, match="processes are left"):
            testbed.assert_no_leftovers()
    finally:
        process.kill()
        process.communicate()
    testbed.assert_no_leftovers()


def test_an_environment_that_a_fault_changed_is_seen(testbed: Testbed) -> None:
    with pytest.raises(NotSurvived, match="no complete generation"):
        testbed.active_is_whole()
    assert testbed.python(REBUILD).code == 0
    active = generations.active(testbed.home)
    assert active
    next(active.venv.glob("lib/python*/site-packages/plain/data")).unlink()
    with pytest.raises(NotSurvived, match="plain"):
        testbed.active_is_whole()


def test_a_try_that_was_not_survived_fails_the_row_with_its_reason(testbed: Testbed) -> None:
    attempts = Attempts("a fault", testbed)
    with attempts.attempt("first"):
        pass
    with attempts.attempt("second"):
        expect(False, "the old environment is gone")

    check = attempts.done("everything").check()

    assert check.status is Status.FAIL
    assert "tries 2, survived 1" in check.detail
    assert "second: the old environment is gone" in check.detail


def test_a_fault_that_was_never_tried_does_not_pass(testbed: Testbed) -> None:
    assert Attempts("a fault", testbed).done("nothing").check().status is Status.FAIL
