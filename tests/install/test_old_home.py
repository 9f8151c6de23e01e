"""A home that version 0.1.0 set up is taken over: no key and no file name has changed its meaning."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_config, checkout, receipt
from kohya_mps.install.generations import installed
from kohya_mps.install.rollback import choices, rollback
from kohya_mps.install.setup import SetupOptions, configure, setup
from kohya_mps.install.status import status
from kohya_mps.install.uninstall import uninstall
from tests.support.installs import Small, Upstream, git
from tests.support.old_home import LOSSES, WRITTEN, OldHome, make_old_home, was_killed
from tests.support.reports import detail, failed, snapshot, statuses, warned
from tests.support.standin import UNVERIFIED


@pytest.fixture
def old(settings: Settings, small: Small, upstream: Upstream) -> OldHome:
    """An old home with what the lock of the stand-in installs."""
    wheels = [path for path in small.wheels.iterdir() if not path.name.startswith("other_thing-")]
    default = accelerate_config.default_location()
    return make_old_home(settings.home, upstream, small.lock, wheels, default)


def test_status_finds_it_as_it_was_installed_and_verified(old: OldHome, settings: Settings) -> None:
    report = status(settings)
    assert failed(report) == {}
    assert warned(report) == {}
    assert detail(report, "smoke check") == f"passed on cpu at {WRITTEN}"
    assert detail(report, "training step") == f"passed on cpu at {WRITTEN}"
    assert [(row.name, row.active, row.verified) for row in report.extra["generations"]] == [
        (old.active, True, True),
        (old.before, False, True),
    ]


def test_set_up_finds_everything_in_place_keeps_the_verdicts_and_changes_no_file(
    old: OldHome, settings: Settings
) -> None:
    before, default = snapshot(old.root), accelerate_config.default_location().read_bytes()
    report = setup(settings, SetupOptions())
    assert statuses(report) == {
        "machine": Status.PASS, "checkout": Status.PASS, "environment": Status.PASS, "configuration": Status.PASS,
        "smoke check": Status.SKIP, "training step": Status.SKIP,
    }  # fmt: skip
    assert "in place" in detail(report, "checkout")
    assert f"{old.active} in place" in detail(report, "environment")
    assert report.extra["losses"] == tuple(LOSSES)
    assert report.extra["kohya_trainer_ran"] is True
    assert snapshot(old.root) == before
    assert accelerate_config.default_location().read_bytes() == default


def test_a_drift_in_it_is_found(old: OldHome, settings: Settings) -> None:
    core = next(Installation(old.root).venv.glob("lib/*/site-packages/plain/core.py"))
    os.utime(core, ns=(1, 1))
    assert set(failed(status(settings))) == {"package plain"}


def test_the_generations_are_listed_and_the_one_before_comes_back(
    old: OldHome, settings: Settings, upstream: Upstream
) -> None:
    listed = choices(settings)
    assert [check.name for check in listed.checks] == [old.active, old.before]
    assert listed.checks[0].detail == f"active, {upstream.commit[:12]}, {WRITTEN}"
    assert rollback(settings).extra["generation"] == old.before
    assert installed(Installation(old.root)).name == old.before
    assert rollback(settings).extra["generation"] == old.active


def test_a_run_that_was_killed_in_it_is_finished(
    old: OldHome, settings: Settings, upstream: Upstream
) -> None:
    was_killed(old, upstream)
    assert "checkout" in warned(status(settings))
    report = setup(settings, SetupOptions())
    assert report.ok
    assert checkout.present(Installation(old.root)) == checkout.Commits(
        upstream.commit, upstream.sd_scripts_commit
    )
    assert git(old.root, "status", "--porcelain") == ""
    assert not {path.name for path in (old.root / ".kohya-mps").iterdir()} & {
        "holder.json",
        "moving-kohya_ss.json",
    }


def test_a_configuration_that_is_written_again_unchanged_keeps_its_verdicts(
    old: OldHome, settings: Settings
) -> None:
    before = receipt.read(installed(Installation(old.root)))
    assert before is not None
    assert configure(settings, replace_default=False).ok
    assert receipt.read(installed(Installation(old.root))) == before


def test_it_is_removed_whole(old: OldHome, settings: Settings) -> None:
    assert uninstall(settings, yes=True).ok
    assert not old.root.exists()
    assert not accelerate_config.default_location().exists()


def test_a_file_of_the_users_in_it_stays(old: OldHome, settings: Settings) -> None:
    mine = old.root / "outputs" / "mine.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    report = uninstall(settings, yes=True)
    assert statuses(report)["checkout"] is Status.WARN
    assert mine.read_text() == "mine"


# -- When a recorded verdict still holds ----------------------------------------------------------
# The stand-in has no torch: a verification that runs fails.


def half_precision(settings: Settings) -> Settings:
    """Another precision, which the profile then allows on every device."""
    allowed = dict.fromkeys(("mps", "cuda", "cpu"), ("no", "bf16"))
    profile = msgspec.structs.replace(settings.profile, mixed_precision=allowed)
    return msgspec.structs.replace(settings, profile=profile, mixed_precision="bf16")


def test_on_another_configuration_everything_is_verified_again(old: OldHome, settings: Settings) -> None:
    generation = installed(Installation(old.root))
    with generation.accelerate_config.open("a") as file:
        file.write("further: 1\n")  # what is written by hand and does not contradict stays
    report = setup(settings, SetupOptions())
    assert statuses(report)["configuration"] is Status.PASS
    assert statuses(report)["smoke check"] is Status.FAIL
    assert statuses(report)["training step"] is Status.FAIL


def test_another_precision_is_another_configuration(old: OldHome, settings: Settings) -> None:
    report = setup(half_precision(settings), SetupOptions())
    assert statuses(report)["smoke check"] is Status.FAIL
    known = receipt.read(installed(Installation(old.root)))
    assert known is not None
    assert known.mixed_precision == "bf16"


@pytest.mark.parametrize("field", ["smoke", "train_step"])
def test_a_verification_that_failed_is_run_again(field: str, old: OldHome, settings: Settings) -> None:
    generation = installed(Installation(old.root))
    fields = json.loads(generation.receipt.read_bytes())
    fields[field]["ok"] = False
    generation.receipt.write_text(json.dumps(fields))
    report = setup(settings, SetupOptions())
    again, kept = ("smoke check", "training step") if field == "smoke" else ("training step", "smoke check")
    assert statuses(report)[again] is Status.FAIL
    assert statuses(report)[kept] is Status.SKIP


def test_with_another_commit_only_the_training_is_verified_again(
    old: OldHome, settings: Settings, upstream: Upstream
) -> None:
    report = setup(msgspec.structs.replace(settings, commit=upstream.old), SetupOptions())
    assert statuses(report)["smoke check"] is Status.SKIP
    assert statuses(report)["training step"] is Status.FAIL


@pytest.mark.parametrize(
    "options", [SetupOptions(smoke=False), SetupOptions(train_step=False), UNVERIFIED], ids=str
)
def test_a_verification_that_is_not_requested_keeps_its_verdict(
    options: SetupOptions, old: OldHome, settings: Settings, upstream: Upstream
) -> None:
    report = setup(msgspec.structs.replace(settings, commit=upstream.old), options)
    assert report.ok
    assert statuses(report)["training step"] is Status.SKIP
    known = receipt.read(installed(Installation(old.root)))
    assert known is not None
    assert known.train_step is not None
    assert known.train_step.at == WRITTEN


def test_a_generation_that_passed_is_made_active_again(old: OldHome, settings: Settings) -> None:
    rollback(settings)
    report = setup(settings, SetupOptions())
    assert report.ok
    assert installed(Installation(old.root)).name == old.active == report.extra["generation"]


def test_where_none_is_active_one_that_fails_the_smoke_check_is_made_active(
    old: OldHome, settings: Settings
) -> None:
    generation = installed(Installation(old.root))
    Installation(old.root).venv.unlink()
    generation.receipt.unlink()
    report = setup(settings, SetupOptions())
    assert statuses(report)["smoke check"] is Status.FAIL
    assert installed(Installation(old.root)) == generation


def test_another_configuration_takes_the_verdicts_out_of_the_receipt(
    old: OldHome, settings: Settings
) -> None:
    configure(half_precision(settings), replace_default=False)
    known = receipt.read(installed(Installation(old.root)))
    assert known is not None
    assert (known.smoke, known.train_step) == (None, None)
    assert set(warned(status(settings))) == {"smoke check", "training step"}
