"""The faults of ``nox -s chaos``, small: a lock of two small wheels and two small repositories."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from devtools import chaos
from devtools.chaos import damage, disk, kills, network
from devtools.chaos.kills import Moment, Timeline
from devtools.chaos.testbed import (
    REBUILD,
    SMALL_PROFILE,
    STALL_SECONDS,
    Attempts,
    CannotTry,
    NotSurvived,
    Testbed,
    expect,
    processes_of,
)
from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.core.report import Status
from kohya_mps.install import checkout, generations
from tests.support.installs import Upstream, git, make_settings
from tests.support.wheelhouse import pin, wheel


@pytest.fixture
def place(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    """A copy of the project that installs two small wheels and checks out the small upstream."""
    house, root = tmp_path / "wheels", tmp_path / "chaos"
    pins = [
        pin(wheel(house, name, "1.0", files={f"{name}/data": b"x" * 1000})) for name in ("plain", "other")
    ]
    monkeypatch.setenv("UV_FIND_LINKS", str(house))
    root.mkdir()
    chosen = msgspec.structs.replace(settings.load(), url=str(upstream.kohya_ss), commit=upstream.commit)
    made = Testbed(root, chosen, SMALL_PROFILE, real=False)
    made.use_small_lock("".join(pins))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_kill_during_a_rebuild_leaves_the_old_environment_and_one_rerun_ends_good(
    share: float, place: Testbed
) -> None:
    first = place.python(REBUILD)
    assert first.code == 0, first.said
    before = generations.active(place.home)
    place.new_lock()

    kills.kill(place.start_python(REBUILD), Moment(0, first.seconds * share))

    place.active_is_whole()
    assert place.python(REBUILD).code == 0
    assert generations.active(place.home) != before
    place.active_is_whole()
    place.assert_no_leftovers()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_kill_during_a_checkout_is_mended_by_one_rerun(
    share: float, place: Testbed, upstream: Upstream
) -> None:
    first = place.invoke("clone")
    assert first.code == 0, first.said
    place.remove()

    kills.kill(place.start("clone"), Moment(0, first.seconds * share))

    again = place.invoke("clone")
    assert again.code == 0, again.said
    assert checkout.present(place.home) == checkout.Commits(upstream.commit, upstream.sd_scripts_commit)
    assert checkout.local_changes(place.home.root) == []
    place.assert_no_leftovers()


def test_two_runs_together_end_good_or_name_each_other(place: Testbed) -> None:
    two = [place.start("clone") for _ in range(2)]
    said = [process.communicate()[1] for process in two]
    codes = [process.returncode for process in two]

    assert sorted(codes) in ([0, 0], [0, 3]), said
    if 3 in codes:
        busy = codes.index(3)
        assert f"process {two[1 - busy].pid}" in said[busy]


@pytest.mark.slow
@pytest.mark.parametrize("answer", [network.silence, network.half_a_page])
def test_an_index_that_stops_answering_fails_in_time_and_leaves_nothing(
    answer: network.Answer, place: Testbed
) -> None:
    variables = {"UV_CACHE_DIR": str(place.root / "empty"), "UV_OFFLINE": "0", "UV_FIND_LINKS": ""}
    with network.serving(answer) as port:
        ran = place.python(REBUILD, **variables, **network.only_index(port))

    assert ran.code == 1
    assert "uv could not install" in ran.err
    assert ran.seconds < network.INDEX_SECONDS * 20
    assert not os.path.lexists(place.home.venv)
    place.assert_no_leftovers()
    assert place.python(REBUILD).code == 0


@pytest.mark.slow
def test_a_git_server_that_stops_half_way_fails_in_time_and_the_rerun_ends_good(
    place: Testbed, upstream: Upstream
) -> None:
    try:
        with network.git_server(upstream.kohya_ss / ".git") as server:
            relay = network.Relay(server)
            relay.limit = 900  # behind what git asks first, and in front of the end
            with network.serving(relay) as port:
                ran = place.invoke("clone", KOHYA_REPO_URL=f"git://127.0.0.1:{port}/.git")
    except CannotTry as reason:
        pytest.skip(str(reason))

    assert relay.passed == relay.limit
    assert ran.code == 1
    assert f"sent nothing for {STALL_SECONDS:g} seconds" in ran.err
    assert place.invoke("clone").code == 0
    place.assert_no_leftovers()


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["", "sd-scripts"])
@pytest.mark.parametrize("what", damage.DAMAGES)
def test_a_damaged_repository_is_replaced_and_the_users_file_is_never_written_over(
    what: str, inside: str, upstream: Upstream, tmp_path: Path
) -> None:
    chosen = make_settings(tmp_path / "home", url=str(upstream.kohya_ss), commit=upstream.commit)
    checkout.ensure_checkout(chosen)
    tree = chosen.home / inside
    mine = tree / ("train_network.py" if inside else "kohya_gui.py")
    mine.write_text("mine\n")

    damage.DAMAGES[what](tree)

    with pytest.raises(UsageError, match=mine.name):
        checkout.ensure_checkout(chosen)
    assert mine.read_text() == "mine\n"
    checkout.ensure_checkout(chosen, stash=True)
    assert "+mine" in git(tree, "stash", "show", "--patch")
    assert checkout.local_changes(tree) == []


def test_a_lock_with_a_wrong_digest_changes_nothing_and_the_right_one_goes_on(place: Testbed) -> None:
    assert place.python(REBUILD).code == 0
    before, good = generations.active(place.home), place.lock.read_text()

    place.lock.write_text(damage.wrong_digest(good, "plain"))
    ran = place.python(REBUILD)

    assert ran.code == 1
    assert "small.txt" in ran.err
    assert generations.active(place.home) == before
    place.active_is_whole()
    place.assert_no_leftovers()
    place.lock.write_text(good)
    assert place.python(REBUILD).code == 0
    assert generations.active(place.home) == before


def test_status_works_in_a_home_that_cannot_be_written(place: Testbed) -> None:
    assert place.python(REBUILD).code == 0
    try:
        with disk.not_writable(place.home.root):
            ran, report = place.told("status")
    except CannotTry as reason:
        pytest.skip(str(reason))

    assert "Traceback" not in ran.err
    assert report.status("environment") is Status.PASS


def test_leftovers_of_a_kill_are_seen(place: Testbed) -> None:
    """The session would be worth nothing if it overlooked them."""
    place.home.state.mkdir(parents=True)
    for path in (place.home.state / ".receipt.json.new", place.temporary / "something"):
        path.touch()
        with pytest.raises(NotSurvived, match="temporary files"):
            place.assert_no_leftovers()
        path.unlink()
    (place.home.generations / "half").mkdir(parents=True)
    with pytest.raises(NotSurvived, match="half-built"):
        place.assert_no_leftovers()
    (place.home.generations / "half").rmdir()
    process = place.start_python("import time; time.sleep(60)")
    try:
        while not processes_of(place.home):
            assert process.poll() is None
        with pytest.raises(NotSurvived, match="processes are left"):
            place.assert_no_leftovers()
    finally:
        process.kill()
        process.communicate()
    place.assert_no_leftovers()


def test_an_environment_that_a_fault_changed_is_seen(place: Testbed) -> None:
    with pytest.raises(NotSurvived, match="no complete generation"):
        place.active_is_whole()
    assert place.python(REBUILD).code == 0
    active = generations.active(place.home)
    assert active
    next(active.venv.glob("lib/python*/site-packages/plain/data")).unlink()
    with pytest.raises(NotSurvived, match="plain"):
        place.active_is_whole()


def test_the_moments_of_kills_cover_every_step_and_the_whole_time() -> None:
    line = Timeline(steps=(0.5, 0.6, 1.5, 3.0, 10.0, 30.0), end=60.0)

    moments = line.moments(28)

    bounds = [0.0, *line.steps, line.end]
    assert len(moments) == 28
    assert {moment.step for moment in moments} == set(range(7))
    assert all(0 <= m.seconds <= bounds[m.step + 1] - bounds[m.step] for m in moments)
    assert sum(bounds[m.step] + m.seconds > 30 for m in moments) >= 7


def test_a_try_that_was_not_survived_fails_the_row_with_its_reason(place: Testbed) -> None:
    tries = Attempts("a fault")
    with tries.attempt("first", place):
        pass
    with tries.attempt("second", place):
        expect(False, "the old environment is gone")

    check = tries.done("everything").check()

    assert check.status is Status.FAIL
    assert "tries 2, survived 1" in check.detail
    assert "second: the old environment is gone" in check.detail


def test_a_fault_that_was_never_tried_does_not_pass() -> None:
    assert Attempts("a fault").done("nothing").check().status is Status.FAIL


@pytest.mark.parametrize("arguments", [["--kills", "x"], ["--only", "earthquake"], ["--unknown"]])
def test_wrong_arguments_are_refused_with_what_can_be_typed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        chaos.parse_options(arguments)
    assert "nox -s chaos --" in capsys.readouterr().err
