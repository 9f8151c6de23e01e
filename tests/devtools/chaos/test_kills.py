from __future__ import annotations

from collections.abc import Callable

import pytest

from devtools.chaos import kills
from devtools.chaos.kills import Moment, Timeline
from devtools.chaos.testbed import REBUILD, NotSurvived, Row, Testbed
from kohya_mps.install import checkout, generations
from tests.support.installs import Upstream


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_kill_during_a_rebuild_leaves_the_old_environment_and_one_rerun_ends_good(
    share: float, testbed: Testbed
) -> None:
    first = testbed.python(REBUILD)
    assert first.code == 0, first.last_lines
    before = generations.active(testbed.home)
    testbed.new_lock()

    kills.kill(testbed.start_python(REBUILD), Moment(0, first.seconds * share))

    testbed.active_is_whole()
    assert testbed.python(REBUILD).code == 0
    assert generations.active(testbed.home) != before
    testbed.active_is_whole()
    testbed.assert_no_leftovers()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_kill_during_a_checkout_is_mended_by_one_rerun(
    share: float, testbed: Testbed, upstream: Upstream
) -> None:
    first = testbed.invoke("clone")
    assert first.code == 0, first.last_lines
    testbed.remove()

    kills.kill(testbed.start("clone"), Moment(0, first.seconds * share))

    again = testbed.invoke("clone")
    assert again.code == 0, again.last_lines
    assert checkout.present(testbed.home) == checkout.Commits(upstream.commit, upstream.sd_scripts_commit)
    assert checkout.local_changes(testbed.home.root) == []
    testbed.assert_no_leftovers()


def test_two_runs_together_end_good_or_name_each_other(testbed: Testbed) -> None:
    two = [testbed.start("clone") for _ in range(2)]
    errors = [process.communicate()[1] for process in two]
    codes = [process.returncode for process in two]

    assert sorted(codes) in ([0, 0], [0, 3]), errors
    if 3 in codes:
        busy = codes.index(3)
        assert f"process {two[1 - busy].pid}" in errors[busy]


def test_the_moments_of_kills_cover_every_step_and_the_whole_time() -> None:
    line = Timeline(steps=(0.5, 0.6, 1.5, 3.0, 10.0, 30.0), end=60.0)

    moments = line.moments(28)

    bounds = [0.0, *line.steps, line.end]
    assert len(moments) == 28
    assert {moment.step for moment in moments} == set(range(7))
    assert all(0 <= m.seconds <= bounds[m.step + 1] - bounds[m.step] for m in moments)
    assert sum(bounds[m.step] + m.seconds > 30 for m in moments) >= 7


class CheckoutTestbed(Testbed):
    """Kills hit `invoke clone`, which takes a second; a set-up would have to train."""

    @property
    def setup_command(self) -> tuple[str, ...]:
        return ("clone",)

    def assert_recovers(self) -> None:
        self.invoke("clone").assert_code(0, "the rerun")
        self.assert_no_leftovers()


class BrokenTestbed(CheckoutTestbed):
    """Never recovers."""

    def assert_recovers(self) -> None:
        raise NotSurvived("the rerun is broken")


@pytest.mark.slow
@pytest.mark.parametrize("testbed", [CheckoutTestbed], indirect=True)
def test_the_kills_of_a_fresh_install_are_counted_and_each_rerun_is_checked(testbed: Testbed) -> None:
    row = kills.kills_fresh(testbed, 4)
    assert (row.tries, row.survived) == (4, 4), row.failures
    assert row.checked.startswith("invoke clone (no real kohya_ss) of ")


@pytest.mark.parametrize("testbed", [BrokenTestbed], indirect=True)
def test_a_kill_that_is_not_survived_is_named_with_its_moment(testbed: Testbed) -> None:
    row = kills.kills_fresh(testbed, 1)
    assert (row.tries, row.survived) == (1, 0)
    assert row.failures[0].startswith("killed ")
    assert row.failures[0].endswith("the rerun is broken")


@pytest.mark.parametrize("testbed", [CheckoutTestbed], indirect=True)
def test_an_undisturbed_run_that_fails_is_no_timeline(testbed: Testbed) -> None:
    testbed.environ["KOHYA_REPO_URL"] = str(testbed.root / "gone")
    with pytest.raises(NotSurvived, match="an undisturbed run"):
        kills.reference(testbed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kills.kills_rebuild, kills.pairs])
def test_kills_of_a_rebuild_and_two_runs_at_once_are_survived(
    fault: Callable[[Testbed, int], Row], stand_in: Testbed
) -> None:
    row = fault(stand_in, 2)
    assert row.survived == row.tries >= 2, row.failures
