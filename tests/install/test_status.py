from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.installation import Installation
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_config, generations, inventory, receipt
from kohya_mps.install.generations import installed
from kohya_mps.install.setup import setup
from kohya_mps.install.status import listed, status
from tests.support.installs import Small, Upstream, git
from tests.support.reports import failed, snapshot, warned
from tests.support.standin import UNVERIFIED, make_lock


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """An installation of small packages."""
    assert setup(settings, UNVERIFIED).ok
    return settings


def test_a_good_installation_has_no_drift_and_looking_changes_nothing(
    settings: Settings, upstream: Upstream
) -> None:
    before = snapshot(settings.home)
    report = status(settings)
    assert snapshot(settings.home) == before
    assert report.ok
    assert set(warned(report)) == {"smoke check", "training step"}  # neither was requested
    details = {check.name: check.detail for check in report.checks}
    assert details["kohya_ss"] == upstream.commit
    assert details["sd-scripts"] == upstream.sd_scripts_commit
    assert "3 packages as they were installed" in details["environment"]


def test_a_bare_home_fails_with_the_command_that_installs(settings: Settings, tmp_path: Path) -> None:
    bare = msgspec.structs.replace(settings, home=tmp_path / "bare")
    report = status(bare)
    assert set(failed(report)) == {"checkout", "environment"}
    assert all("invoke setup" in check.fix for check in failed(report).values())
    assert not bare.home.exists()


def _core(settings: Settings) -> Path:
    return inventory.site_packages(installed(Installation(settings.home)).venv) / "plain" / "core.py"


def _stray(settings: Settings) -> None:
    (_core(settings).parent.parent / "sitecustomize.py").touch()


def _move_submodule(settings: Settings) -> None:
    git(Installation(settings.home).sd_scripts, "commit", "--quiet", "--allow-empty", "-m", "mine")


@pytest.mark.parametrize(
    ("change", "row", "message", "fix"),
    [
        (lambda s: _core(s).unlink(), "package plain", "changed or deleted", "invoke setup"),
        (_stray, "package sitecustomize.py", "belongs to no package", "invoke setup"),
        (lambda s: (s.home / "kohya_gui.py").write_text("x"), "file kohya_gui.py", "changed", "--stash"),
        (lambda s: (s.home / "sd-scripts" / "train_network.py").unlink(), "file sd-scripts/train_network.py",
         "changed", "--stash"),
        (_move_submodule, "sd-scripts", "is at", "invoke clone"),
        (lambda s: installed(Installation(s.home)).accelerate_config.write_text("use_cpu: true"),
         "accelerate configuration", "was edited", "invoke configure"),
        (lambda s: installed(Installation(s.home)).accelerate_config.unlink(), "accelerate configuration", "is missing",
         "invoke configure"),
        (lambda s: Installation(s.home).venv.unlink(), "environment", "there is none", "invoke setup"),
    ],
)  # fmt: skip
def test_each_drift_is_a_row_with_the_command_that_repairs_it(
    change: Callable[[Settings], object], row: str, message: str, fix: str, settings: Settings
) -> None:
    change(settings)
    report = status(settings)
    assert set(failed(report)) == {row}
    assert message in failed(report)[row].detail
    assert fix in failed(report)[row].fix
    if fix == "invoke setup":
        assert setup(settings, UNVERIFIED).ok
        assert status(settings).ok


def test_an_environment_of_somebody_elses_fails(settings: Settings) -> None:
    home = Installation(settings.home)
    home.venv.unlink()
    home.venv.mkdir()
    assert "not built by this project" in failed(status(settings))["environment"].detail


def test_an_interpreter_that_is_gone_fails(settings: Settings, tmp_path: Path) -> None:
    generation = installed(Installation(settings.home))
    theirs = tmp_path / "python"
    theirs.symlink_to(generation.python.readlink())
    generation.python.unlink()
    generation.python.symlink_to(theirs)
    manifest = generation.manifest()
    assert manifest is not None
    built = msgspec.structs.replace(manifest, inventory=inventory.take(generation.venv))
    generation.complete(built)  # as if it had been built with that Python
    assert not failed(status(settings))
    theirs.unlink()
    assert "is gone" in failed(status(settings))["interpreter"].detail


def test_a_verification_that_failed_is_a_failure(settings: Settings) -> None:
    generation = installed(Installation(settings.home))
    known = receipt.read(generation)
    assert known is not None
    bad = receipt.Verdict(False, "2026-01-02T03:04:05+00:00", "a training", None, ())
    receipt.save(generation, msgspec.structs.replace(known, smoke=bad, train_step=bad))
    report = status(settings)
    assert {name: check.detail for name, check in failed(report).items()} == {
        "smoke check": f"failed on no device at {bad.at}",
        "training step": f"failed on no device at {bad.at}",
    }
    assert [row.verified for row in report.extra["generations"]] == [False]


def test_an_environment_of_another_profile_with_the_same_lock_is_a_warning(settings: Settings) -> None:
    other = msgspec.structs.replace(settings, profile_name="other")
    assert "than the profile other has now" in warned(status(other))["lock"].detail
    assert "lock" not in warned(status(settings))


def test_a_new_lock_an_interrupted_build_and_an_edited_default_are_warnings(
    settings: Settings, small: Small
) -> None:
    make_lock(small.lock, small.wheels, "1.1")
    (Installation(settings.home).generations / "half").mkdir()
    accelerate_config.default_location().write_text("mine")
    Installation(settings.home).checkout_move.write_bytes(b"{}")
    report = status(settings)
    assert report.ok
    assert {"lock", "build half", "accelerate default", "checkout"} <= warned(report).keys()
    accelerate_config.default_location().unlink()
    assert "was removed" in warned(status(settings))["accelerate default"].detail


def test_a_run_in_progress_is_a_warning_with_its_process(settings: Settings) -> None:
    with exclusive_lock(Installation(settings.home)):
        # Nothing of what it has not finished yet is taken for the rest of a killed run.
        (Installation(settings.home).generations / "half").mkdir()
        Installation(settings.home).checkout_move.write_bytes(b"{}")
        found = warned(status(settings))
        assert f"process {os.getpid()}" in found["run in progress"].detail
        assert not {"build half", "checkout"} & found.keys()
    assert "run in progress" not in warned(status(settings))


def test_the_generations_are_listed_with_the_active_one_first(settings: Settings, small: Small) -> None:
    first = installed(Installation(settings.home))
    make_lock(small.lock, small.wheels, "1.1")
    setup(settings, UNVERIFIED)
    generations.activate(Installation(settings.home), first)
    rows = listed(Installation(settings.home))
    assert [(row.name == first.name, row.active, row.complete) for row in rows] == [
        (True, True, True),
        (False, False, True),
    ]
    assert all(row.bytes for row in rows)
