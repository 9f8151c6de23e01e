from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.chaos import damage
from devtools.chaos.testbed import REBUILD, Row, Testbed
from kohya_mps.core.errors import UsageError
from kohya_mps.install import checkout, generations
from tests.support.installs import Upstream, git, make_settings


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


def test_a_lock_with_a_wrong_digest_changes_nothing_and_the_right_one_goes_on(testbed: Testbed) -> None:
    assert testbed.python(REBUILD).code == 0
    before, good = generations.active(testbed.home), testbed.lock.read_text()

    testbed.lock.write_text(damage.wrong_digest(good, "plain"))
    ran = testbed.python(REBUILD)

    assert ran.code == 1
    assert "small.txt" in ran.err
    assert generations.active(testbed.home) == before
    testbed.active_is_whole()
    testbed.assert_no_leftovers()
    testbed.lock.write_text(good)
    assert testbed.python(REBUILD).code == 0
    assert generations.active(testbed.home) == before


@pytest.mark.slow
def test_an_edit_that_reaches_uvs_cache_does_not_come_back_with_a_rebuild(testbed: Testbed) -> None:
    row = damage.file_edited(testbed)
    assert (row.tries, row.survived) == (3, 3), row.failures
    assert not testbed.home.root.exists()


def test_only_the_digests_of_one_package_are_made_wrong() -> None:
    lock = f"one==1 \\\n    --hash=sha256:{'0' * 64} \\\n    --hash=sha256:{'1' * 64}\ntwo==1 --hash=sha256:{'2' * 64}\n"
    changed = damage.wrong_digest(lock, "one")
    assert "0" * 64 not in changed
    assert "1" * 64 not in changed
    assert changed.endswith(f"two==1 --hash=sha256:{'2' * 64}\n")
    assert len(changed) == len(lock)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [damage.file_deleted, damage.lock_wrong, damage.clock_back])
def test_a_fault_is_survived_in_every_try(fault: Callable[[Testbed], Row], stand_in: Testbed) -> None:
    row = fault(stand_in)
    assert row.survived == row.tries > 0, row.failures


@pytest.mark.slow
def test_a_damaged_checkout_with_a_change_of_the_users_is_survived(
    stand_in: Testbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "DAMAGES", {"HEAD emptied": damage.DAMAGES["HEAD emptied"]})
    row = damage.checkout_damaged(stand_in)
    assert (row.tries, row.survived) == (2, 2), row.failures
