from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
import yaml

from kohya_mps.core.errors import Busy, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_config, checkout, generations, inventory
from kohya_mps.install.generations import Generation, installed
from kohya_mps.install.rollback import choices, rollback
from kohya_mps.install.setup import setup
from tests.support.installs import Small, Upstream, running_as
from tests.support.reports import warned
from tests.support.standin import UNVERIFIED, make_lock


@pytest.fixture
def settings(settings: Settings, small: Small, upstream: Upstream) -> Settings:
    """Two generations: the old lock with the old commit, then the new ones."""
    assert setup(msgspec.structs.replace(settings, commit=upstream.old), UNVERIFIED).ok
    make_lock(small.lock, small.wheels, "1.1")
    assert setup(settings, UNVERIFIED).ok
    return settings


def older(settings: Settings) -> Generation:
    found = generations.previous(Installation(settings.home))
    assert found is not None
    return found


def test_the_environment_before_comes_back_with_its_commit_and_configuration(
    settings: Settings, upstream: Upstream
) -> None:
    target, newer = older(settings), installed(Installation(settings.home))
    target.accelerate_config.write_text(yaml.safe_dump({**accelerate_config.fields(settings), "further": 1}))
    report = rollback(msgspec.structs.replace(settings, url="/nowhere"))
    assert report.ok
    home = Installation(settings.home)
    assert installed(home) == target
    assert inventory.versions(target.venv)["plain"] == "1.0"
    assert checkout.present(home) == checkout.Commits(upstream.old, upstream.old_sd_scripts)
    assert yaml.safe_load(accelerate_config.default_location().read_text())["further"] == 1
    # And forward again, by the same command or by name.
    assert rollback(settings).ok
    assert installed(home) == newer
    assert rollback(settings, target.name).extra["generation"] == target.name


def test_it_takes_well_under_a_second(settings: Settings) -> None:
    rollback(settings)
    started = time.process_time()
    rollback(settings)
    assert time.process_time() - started < 0.5


def test_the_choices_are_listed_with_their_commits(settings: Settings, upstream: Upstream) -> None:
    report = choices(settings)
    assert [check.name for check in report.checks] == [
        installed(Installation(settings.home)).name,
        older(settings).name,
    ]
    assert report.checks[0].detail.startswith(f"active, {upstream.commit[:12]}")
    assert report.checks[1].detail.startswith(upstream.old[:12])


@pytest.mark.parametrize("name", ["no-such", "../generations", ".."])
def test_a_generation_that_is_not_there_is_refused(name: str, settings: Settings) -> None:
    before = installed(Installation(settings.home))
    with pytest.raises(UsageError, match="no generation"):
        rollback(settings, name)
    assert installed(Installation(settings.home)) == before


def test_a_path_to_a_generation_is_no_name_of_one(settings: Settings) -> None:
    with pytest.raises(UsageError, match="no generation"):
        rollback(settings, f"../generations/{older(settings).name}")


def test_one_that_never_was_configured_comes_back_with_a_warning(settings: Settings) -> None:
    target = older(settings)
    target.accelerate_config.unlink()
    report = rollback(settings)
    assert report.ok
    assert warned(report)["accelerate configuration"].fix == "`invoke configure` writes it"
    assert installed(Installation(settings.home)) == target


def test_without_an_earlier_one_it_is_refused(small: Small, upstream: Upstream) -> None:
    make_lock(small.lock, small.wheels)
    with pytest.raises(UsageError, match="no earlier generation"):
        rollback(small.settings)


def test_one_that_was_changed_since_is_refused(settings: Settings) -> None:
    before = installed(Installation(settings.home))
    (inventory.site_packages(older(settings).venv) / "plain" / "core.py").unlink()
    with pytest.raises(UsageError, match="no longer as it was built: plain"):
        rollback(settings)
    assert installed(Installation(settings.home)) == before


def test_local_changes_stop_it_before_the_environment_is_switched(settings: Settings) -> None:
    before = installed(Installation(settings.home))
    (settings.home / "kohya_gui.py").write_text("mine\n")
    with pytest.raises(UsageError, match=r"kohya_gui\.py"):
        rollback(settings)
    assert installed(Installation(settings.home)) == before
    assert (settings.home / "kohya_gui.py").read_text() == "mine\n"


def test_the_checkout_is_not_switched_under_a_training(settings: Settings) -> None:
    now = installed(Installation(settings.home))
    with (
        running_as(now.python) as training,
        pytest.raises(Busy, match=rf"process {training} .* change the files"),
    ):
        rollback(settings)
    assert installed(Installation(settings.home)) == now
    commits = checkout.present(Installation(settings.home))
    assert commits is not None
    assert commits.kohya_ss == settings.commit
    rollback(settings)


def test_somebody_elses_default_configuration_stays(settings: Settings) -> None:
    accelerate_config.default_location().write_text("theirs")
    report = rollback(settings)
    assert report.checks[-1].status is Status.WARN
    assert accelerate_config.default_location().read_text() == "theirs"


def test_a_home_in_use_is_refused(settings: Settings) -> None:
    with exclusive_lock(Installation(settings.home)), pytest.raises(Busy):
        rollback(settings)


def test_a_neighbour_is_unchanged(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "file").write_text("theirs")
    before = (tmp_path / "ComfyUI" / "file").stat().st_mtime_ns
    rollback(settings)
    assert (tmp_path / "ComfyUI" / "file").stat().st_mtime_ns == before
