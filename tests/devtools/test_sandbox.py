from __future__ import annotations

from pathlib import Path

import pytest

from devtools import sandbox
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.install import checkout, generations
from kohya_mps.install.training_step import TrainingStepOptions
from tests.support.installs import Small, Upstream, make_settings
from tests.support.standin import make_lock


@pytest.fixture
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The isolated installation lies in the test's own directory."""
    home = tmp_path / "isolated"
    monkeypatch.setattr(sandbox, "SANDBOX", home)
    return home


def test_the_installed_checkout_is_used_where_there_is_one(
    tmp_path: Path, upstream: Upstream, isolated_home: Path
) -> None:
    settings = make_settings(tmp_path / "home", url=str(upstream.kohya_ss), commit=upstream.commit)
    checkout.ensure_checkout(settings)
    assert sandbox.kohya_checkout(settings) == tmp_path / "home"
    assert not isolated_home.exists()


def test_without_an_installed_checkout_the_isolated_installation_gets_one(
    tmp_path: Path, upstream: Upstream, isolated_home: Path
) -> None:
    settings = make_settings(tmp_path / "home", url=str(upstream.kohya_ss), commit=upstream.commit)
    assert sandbox.kohya_checkout(settings) == isolated_home
    assert (isolated_home / "sd-scripts" / "train_network.py").is_file()
    assert not (tmp_path / "home").exists()


def test_a_checkout_that_cannot_be_made_names_the_step_that_needs_none(
    tmp_path: Path, isolated_home: Path
) -> None:
    with pytest.raises(StepFailed, match=r"none can be made") as refusal:
        sandbox.kohya_checkout(make_settings(tmp_path / "home", url=str(tmp_path / "gone")))
    assert "--builtin" in refusal.value.fix


def test_the_environment_is_built_in_isolation_and_the_users_home_is_left_alone(
    small: Small, isolated_home: Path
) -> None:
    make_lock(small.lock, small.wheels)
    report = sandbox.run_smoke_check(small.settings)
    found = {check.name: check for check in report.checks}
    assert found["isolation"].status is Status.PASS
    assert found["isolation"].detail.startswith(str(isolated_home))
    assert found["device"].status is Status.FAIL  # the small lock has no torch
    active = generations.active(Installation(isolated_home))
    assert active is not None
    assert active.accelerate_config.is_file()
    assert not small.settings.home.exists()


def test_a_training_step_that_does_not_exist_is_refused_before_anything_is_built(
    tmp_path: Path, isolated_home: Path
) -> None:
    with pytest.raises(UsageError, match="small model only"):
        sandbox.run_training_step(
            make_settings(tmp_path / "home"), TrainingStepOptions(full=True, builtin=True)
        )
    assert not isolated_home.exists()


def test_what_is_typed_is_what_is_trained() -> None:
    assert sandbox.parse_options([]) == TrainingStepOptions()
    typed = ["--network", "loha", "--optimizer", "Lion", "--builtin"]
    assert sandbox.parse_options(typed) == TrainingStepOptions("loha", "Lion", builtin=True)
