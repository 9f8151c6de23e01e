from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import yaml
from filelock import FileLock

from kohya_mps.core.errors import Busy, StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Report, Status
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_config, checkout, environment, generations, inventory, receipt
from kohya_mps.install.generations import installed
from kohya_mps.install.setup import SetupOptions, check_machine, configure, setup, verify
from kohya_mps.train import start
from tests.support.installs import Small, Upstream
from tests.support.reports import detail, snapshot, statuses
from tests.support.standin import UNVERIFIED, make_lock


def new_lock(small: Small, version: str) -> None:
    make_lock(small.lock, small.wheels, version)


def test_a_bare_machine_gets_checkout_environment_and_configuration(
    settings: Settings, upstream: Upstream
) -> None:
    report = setup(settings, UNVERIFIED)
    assert report.ok
    assert statuses(report) == {
        "machine": Status.PASS, "checkout": Status.PASS, "environment": Status.PASS, "configuration": Status.PASS,
        "smoke check": Status.SKIP, "training step": Status.SKIP,
    }  # fmt: skip
    home = Installation(settings.home)
    generation = installed(home)
    assert yaml.safe_load(generation.accelerate_config.read_text()) == accelerate_config.fields(settings)
    assert accelerate_config.is_ours(accelerate_config.default_location())
    known = receipt.read(generation)
    assert known is not None
    assert known.commits == checkout.Commits(upstream.commit, upstream.sd_scripts_commit)
    assert known.distributions == {"plain": "1.0", "accelerate": "1.3.0", "pyyaml": "6.0"}
    assert known.accelerate_config == receipt.config_digest(generation)
    assert known.smoke is None
    assert report.extra["generation"] == generation.name
    assert "not verified" in "".join(report.summary)


def test_a_second_run_changes_no_file(settings: Settings) -> None:
    setup(settings, UNVERIFIED)
    before = snapshot(settings.home)
    report = setup(settings, UNVERIFIED)
    assert report.ok
    assert "in place" in detail(report, "checkout")
    assert "in place" in detail(report, "environment")
    assert snapshot(settings.home) == before


def test_without_the_repository_the_rest_is_done_and_the_next_run_has_that_left(settings: Settings) -> None:
    report = setup(msgspec.structs.replace(settings, url="/nowhere"), UNVERIFIED)
    assert not report.ok
    assert statuses(report)["checkout"] is Status.FAIL
    assert statuses(report)["environment"] is Status.PASS
    assert statuses(report)["configuration"] is Status.PASS
    assert "invoke setup" in "".join(report.summary)
    again = setup(settings, UNVERIFIED)
    assert again.ok
    assert "checked out" in detail(again, "checkout")
    assert "in place" in detail(again, "environment")


def test_without_the_packages_the_checkout_is_still_done(settings: Settings, small: Small) -> None:
    text = small.lock.read_text()
    small.lock.write_text(_other_hash(text))
    report = setup(settings, UNVERIFIED)
    assert not report.ok
    assert statuses(report)["checkout"] is Status.PASS
    assert statuses(report)["environment"] is Status.FAIL
    assert statuses(report)["configuration"] is Status.SKIP
    small.lock.write_text(text)
    assert setup(settings, UNVERIFIED).ok


def _other_hash(text: str) -> str:
    at = text.index("sha256:") + 7
    return text[:at] + "0" * 64 + text[at + 64 :]


def test_a_package_that_was_changed_is_repaired(settings: Settings) -> None:
    setup(settings, UNVERIFIED)
    first = installed(Installation(settings.home))
    (inventory.site_packages(first.venv) / "plain" / "core.py").unlink()
    report = setup(settings, UNVERIFIED)
    assert report.ok
    second = installed(Installation(settings.home))
    assert second != first
    assert generations.present(Installation(settings.home)) == [second]
    assert setup(settings, UNVERIFIED).extra["generation"] == second.name


def test_a_new_lock_is_built_beside_the_old_one_which_is_kept(settings: Settings, small: Small) -> None:
    setup(settings, UNVERIFIED)
    first = installed(Installation(settings.home))
    new_lock(small, "1.1")
    setup(settings, UNVERIFIED)
    second = installed(Installation(settings.home))
    assert generations.present(Installation(settings.home)) == [second, first]
    assert inventory.versions(second.venv)["plain"] == "1.1"
    new_lock(small, "1.2")
    setup(settings, UNVERIFIED)
    assert generations.present(Installation(settings.home))[1:] == [second]


def test_somebody_elses_environment_is_only_moved_on_request(settings: Settings) -> None:
    (settings.home / "venv").mkdir(parents=True)
    (settings.home / "venv" / "theirs").write_text("theirs")
    report = setup(settings, UNVERIFIED)
    assert statuses(report) == {"machine": Status.FAIL}
    assert (settings.home / "venv" / "theirs").read_text() == "theirs"
    assert setup(settings, msgspec.structs.replace(UNVERIFIED, replace_venv=True)).ok
    assert [path.read_text() for path in settings.home.glob("venv.before-*/theirs")] == ["theirs"]


def test_what_cannot_end_well_is_refused_before_anything_is_touched(
    settings: Settings, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = msgspec.structs.replace(settings, mixed_precision="fp16")
    with monkeypatch.context() as patch:
        patch.setattr("kohya_mps.install.accelerate_config.expected_device", lambda: "mps")
        with pytest.raises(UsageError, match="fp16"):
            setup(half, UNVERIFIED)
    big = msgspec.structs.replace(settings.profile, disk_gb={"darwin": 1e6, "linux": 1e6})
    report = setup(msgspec.structs.replace(settings, profile=big), UNVERIFIED)
    assert statuses(report) == {"machine": Status.FAIL}
    assert "GB" in detail(report, "machine")
    with monkeypatch.context() as patch:
        patch.setattr("platform.machine", lambda: "riscv64")
        assert "riscv64" in detail(setup(settings, UNVERIFIED), "machine")
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "darwin")
        patch.setattr("platform.machine", lambda: "x86_64")
        assert "Rosetta" in detail(setup(settings, UNVERIFIED), "machine")
    assert not settings.home.exists()


def test_the_disk_and_python_matter_only_where_something_is_built_for_the_first_time(
    settings: Settings,
) -> None:
    """A rebuild takes its files from uv's cache: it needs no room for downloads."""
    setup(settings, UNVERIFIED)
    big = msgspec.structs.replace(settings.profile, disk_gb={"darwin": 1e6, "linux": 1e6})
    full_disk = msgspec.structs.replace(settings, profile=big)
    assert setup(full_disk, UNVERIFIED).ok
    core = inventory.site_packages(installed(Installation(settings.home)).venv) / "plain" / "core.py"
    core.unlink()
    assert setup(full_disk, UNVERIFIED).ok
    no_python = msgspec.structs.replace(settings.profile, python="3.99")
    plan = environment.plan(settings)
    assert check_machine(msgspec.structs.replace(settings, profile=no_python), plan).status is Status.PASS


def test_an_environment_without_a_receipt_is_configured(settings: Settings) -> None:
    environment.rebuild(settings)
    assert configure(settings, replace_default=False).ok
    assert receipt.read(installed(Installation(settings.home))) is None


def test_a_home_in_use_is_refused_whatever_else_is_wrong(settings: Settings) -> None:
    big = msgspec.structs.replace(settings.profile, disk_gb={"darwin": 1e6, "linux": 1e6})
    for each in (settings, msgspec.structs.replace(settings, profile=big)):
        with exclusive_lock(Installation(settings.home)), pytest.raises(Busy):
            setup(each, UNVERIFIED)


@pytest.mark.parametrize("step", [lambda settings: setup(settings, UNVERIFIED), environment.rebuild])
def test_what_another_run_changed_while_this_one_waited_for_the_lock_is_seen(
    step: Callable[[Settings], Report], settings: Settings
) -> None:
    setup(settings, UNVERIFIED)
    home = Installation(settings.home)
    first = installed(home)
    # Without a record of its holder, as in the moment after it was taken: others wait for it.
    with ThreadPoolExecutor() as pool, FileLock(home.state / "lock"):
        waiting = pool.submit(step, settings)
        time.sleep(0.5)
        (inventory.site_packages(first.venv) / "plain" / "core.py").unlink()
        assert not waiting.done()
    assert waiting.result().ok
    done = subprocess.run([installed(home).python, "-c", "import plain.core"], check=False)
    assert done.returncode == 0


def test_the_generation_that_is_active_once_the_lock_is_held_is_configured(
    settings: Settings, small: Small
) -> None:
    setup(settings, UNVERIFIED)
    home = Installation(settings.home)
    new_lock(small, "1.1")
    setup(settings, UNVERIFIED)
    newer, older = installed(home), generations.previous(home)
    assert older is not None
    for generation in (newer, older):
        generation.accelerate_config.unlink()
    with ThreadPoolExecutor() as pool, FileLock(home.state / "lock"):
        waiting = pool.submit(configure, settings, replace_default=False)
        time.sleep(0.5)
        generations.activate(home, older)
    assert waiting.result().ok
    assert older.accelerate_config.exists()
    assert not newer.accelerate_config.exists()


def test_a_new_environment_that_does_not_pass_the_smoke_check_is_not_made_active(
    settings: Settings, small: Small
) -> None:
    """The stand-in has no torch: each check says so in a row of its own, and the others are judged."""
    setup(settings, UNVERIFIED)
    first = installed(Installation(settings.home))
    new_lock(small, "1.1")
    report = setup(settings, SetupOptions(train_step=False))
    assert not report.ok
    assert "No module named 'torch'" in detail(report, "smoke check")
    assert installed(Installation(settings.home)) == first
    assert report.extra["generation"] == first.name


def test_the_smoke_check_judges_each_thing_by_itself(settings: Settings) -> None:
    report = setup(settings, SetupOptions(train_step=False))
    assert not report.ok
    known = receipt.read(installed(Installation(settings.home)))
    assert known is not None
    assert known.smoke is not None
    rows = {check.name: check.status for check in known.smoke.checks}
    good = {"interpreter", "installed versions", "forbidden packages", "isolation"}
    assert {name for name, status in rows.items() if status is Status.PASS} == good
    assert {"device", "accelerator", "one training step", "trainer's modules"} <= rows.keys() - good


def test_a_failed_verification_is_recorded_and_run_again(settings: Settings) -> None:
    setup(settings, UNVERIFIED)
    with pytest.raises(StepFailed, match="could not be made"):
        verify(settings)  # the stand-in cannot make a model
    report = setup(settings, SetupOptions())
    assert statuses(report)["smoke check"] is Status.FAIL
    assert statuses(report)["training step"] is Status.FAIL


def test_nothing_is_verified_trained_or_configured_without_an_installation(
    settings: Settings, tmp_path: Path
) -> None:
    steps: tuple[Callable[[], object], ...] = (
        lambda: verify(settings),
        lambda: configure(settings, replace_default=False),
        lambda: start.train(settings, tmp_path / "x.toml", start.TrainOptions()),
    )
    for step in steps:
        with pytest.raises(UsageError, match="no environment"):
            step()


def test_the_configuration_is_written_again_and_the_receipt_follows(settings: Settings) -> None:
    setup(settings, UNVERIFIED)
    generation = installed(Installation(settings.home))
    generation.accelerate_config.write_text("use_cpu: true\n")
    report = configure(settings, replace_default=False)
    assert report.ok
    assert yaml.safe_load(generation.accelerate_config.read_text())["use_cpu"] is False
    known = receipt.read(generation)
    assert known is not None
    assert known.accelerate_config == receipt.config_digest(generation)


def test_the_environment_alone_is_rebuilt_with_its_configuration(settings: Settings, small: Small) -> None:
    setup(settings, UNVERIFIED)
    first = installed(Installation(settings.home))
    new_lock(small, "1.1")
    report = environment.rebuild(settings)
    assert report.ok
    second = installed(Installation(settings.home))
    assert second != first
    assert second.accelerate_config.read_bytes() == first.accelerate_config.read_bytes()
    assert "in place" in environment.rebuild(settings).checks[0].detail


@pytest.mark.slow
def test_set_up_killed_at_any_time_leaves_the_old_environment_and_the_next_run_ends_good(
    settings: Settings, small: Small
) -> None:
    """A rebuild, killed at points spread over its run; the kill leaves no clean-up to Python."""
    setup(settings, UNVERIFIED)
    started = time.monotonic()
    new_lock(small, "1.1")
    setup(settings, UNVERIFIED)
    whole = time.monotonic() - started
    for n in range(6):
        before = installed(Installation(settings.home))
        new_lock(small, f"2.{n}")
        child = os.fork()
        if child == 0:
            try:
                setup(settings, UNVERIFIED)
            finally:
                os._exit(0)
        time.sleep(whole * n / 6)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        now = installed(Installation(settings.home))
        done = subprocess.run([now.python, "-c", "import plain.core, accelerate"], check=False)
        assert done.returncode == 0
        if now != before:
            assert inventory.versions(now.venv)["plain"] == f"2.{n}"
        assert setup(settings, UNVERIFIED).ok
        assert inventory.versions(installed(Installation(settings.home)).venv)["plain"] == f"2.{n}"
        assert len(generations.present(Installation(settings.home))) == 2


def test_a_neighbours_environment_is_unchanged_by_set_up(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbour = tmp_path / "ComfyUI" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", neighbour], check=True)
    before = snapshot(neighbour)
    monkeypatch.setenv("VIRTUAL_ENV", str(neighbour))
    monkeypatch.setenv("PATH", f"{neighbour / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert setup(settings, UNVERIFIED).ok
    assert snapshot(neighbour) == before


def test_an_environment_of_another_profile_than_the_requested_one_is_refused(
    settings: Settings,
) -> None:
    setup(settings, UNVERIFIED)
    home = Installation(settings.home)
    assert installed(home, settings.profile_name) == installed(home)
    with pytest.raises(UsageError, match=f"of the profile {settings.profile_name}, not another"):
        installed(home, "another")
