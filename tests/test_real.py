"""The real environment, built from the real lock, and a real training in it. Slow: gigabytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from devtools import sandbox
from kohya_mps.core import machine, settings
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import generations, setup, training_step
from kohya_mps.install.generations import Generation

pytestmark = pytest.mark.environment

needs_upstream = pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)


@pytest.fixture(scope="module")
def apart() -> Settings:
    return msgspec.structs.replace(settings.load(), home=sandbox.SANDBOX)


@pytest.fixture(scope="module")
def generation(apart: Settings) -> Generation:
    report = sandbox.run_smoke_check(apart)
    assert report.ok, report.checks
    return generations.installed(Installation(apart.home))


@pytest.fixture
def near(apart: Settings, tmp_path: Path) -> Iterator[Path]:
    """A home on the disk that the environments are on, so that its packages are links."""
    home = apart.home.parent / f"home-of-{tmp_path.name}"
    shutil.rmtree(home, ignore_errors=True)
    yield home
    shutil.rmtree(home, ignore_errors=True)


def test_the_smoke_check_passes_on_the_device_that_is_here(generation: Generation, apart: Settings) -> None:
    report = sandbox.run_smoke_check(apart)

    assert report.ok
    assert report.extra["device"] == machine.expected_device()
    assert len(report.checks) == 9


def test_the_smoke_check_sees_a_package_that_was_replaced(generation: Generation, apart: Settings) -> None:
    from kohya_mps.install import smoke_check

    info = next(generation.venv.glob("lib/python3.11/site-packages/einops-*.dist-info"))
    aside = info.with_name("einops-0.0.1.dist-info")
    original = (info / "METADATA").read_text(encoding="utf-8")
    info.rename(aside)
    # A new file instead of the link: the original in uv's cache stays as it is.
    (aside / "METADATA").unlink()
    (aside / "METADATA").write_text(original.replace("\nVersion: ", "\nVersion: 0.0.1+"), encoding="utf-8")
    try:
        report = smoke_check.run(apart, generation)
    finally:
        shutil.rmtree(generation.path)
        sandbox.run_smoke_check(apart)

    failed = {check.name: check.detail for check in report.checks if check.status is Status.FAIL}
    assert list(failed) == ["installed versions"]
    assert "einops 0.0.1+" in failed["installed versions"]


@pytest.mark.parametrize("network", ["lora", "loha"])
def test_the_built_in_step_trains_and_says_that_kohyas_trainer_was_not_run(
    apart: Settings, network: str
) -> None:
    report = sandbox.run_training_step(
        apart, training_step.TrainingStepOptions(network=network, builtin=True)
    )

    assert report.ok, report.checks
    assert len(report.extra["losses"]) == training_step.STEPS
    assert report.extra["device"] == machine.expected_device()
    assert report.extra["kohya_trainer_ran"] is False
    assert "kohya's trainer was not run" in report.title


def test_a_damaged_model_is_made_again(generation: Generation, apart: Settings) -> None:
    work = Installation(apart.home).verification
    model = training_step.prepare_model(generation, work, "sd15", "small")
    weights = model / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    assert training_step.prepare_model(generation, work, "sd15", "small") == model
    weights.write_bytes(bytes(len(good)))
    assert training_step.prepare_model(generation, work, "sd15", "small") == model
    assert weights.read_bytes() == good


def test_an_untrained_lora_does_not_pass(generation: Generation, apart: Settings) -> None:
    """Weights that are still zero fail the check that looks at them."""
    model = training_step.prepare_model(generation, Installation(apart.home).verification, "sd15", "small")
    output = Installation(apart.home).verification / "untrained"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    options = training_step.TrainingStepOptions(builtin=True)
    still = training_step.builtin_command(generation, model, output, options)
    still[still.index(str(training_step.STEPS))] = "0"

    from kohya_mps.core import process
    from kohya_mps.install import accelerate_launch

    log = output / "trainer.log"
    finished = process.stream(still, env=accelerate_launch.environ(generation, offline=True), log=log)
    left = training_step.inspect(generation, output, options)
    report = training_step.judge(finished, left, log, options)

    verdicts = {check.name: check.status for check in report.checks}
    assert verdicts["saved LoRA"] is Status.FAIL
    assert verdicts["losses"] is Status.FAIL


def test_without_a_repository_everything_else_is_done(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: Settings
) -> None:
    """Environment, configuration, smoke and the built-in step; the next run has only the rest left."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    nowhere = msgspec.structs.replace(apart, home=near, url=str(tmp_path / "nothing"))

    report = setup.setup(nowhere, setup.SetupOptions())

    verdicts = {check.name: check.status for check in report.checks}
    assert not report.ok
    assert verdicts["checkout"] is Status.FAIL
    assert [verdicts[name] for name in ("environment", "configuration", "smoke check", "training step")] == [
        Status.PASS
    ] * 4
    assert report.extra["kohya_trainer_ran"] is False


@needs_upstream
@pytest.mark.upstream
def test_setup_ends_with_kohyas_trainer_having_trained(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: Settings
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    chosen = msgspec.structs.replace(apart, home=near)

    first = setup.setup(chosen, setup.SetupOptions())
    second = setup.setup(chosen, setup.SetupOptions())

    assert first.ok, first.checks
    assert first.extra["kohya_trainer_ran"] is True
    assert json.loads(msgspec.json.encode(first.extra["commits"]))["kohya_ss"] == chosen.commit
    assert [check.status for check in second.checks[-2:]] == [Status.SKIP, Status.SKIP]
    assert second.extra["losses"] == first.extra["losses"]


@needs_upstream
@pytest.mark.upstream
@pytest.mark.parametrize(
    ("network", "optimizer"), [("lora", "Lion"), ("locon", "AdamW"), ("lokr", "Prodigy")]
)
def test_kohyas_trainer_trains_each_network(apart: Settings, network: str, optimizer: str) -> None:
    report = sandbox.run_training_step(
        apart, training_step.TrainingStepOptions(network=network, optimizer=optimizer)
    )

    assert report.ok, report.checks
    assert report.extra["kohya_trainer_ran"] is True
