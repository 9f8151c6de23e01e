"""``invoke train``: what is started, with which arguments, and what can be resumed.

A small program stands in for the trainer's interpreter. The real trainer is in
test_real_training.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device
from kohya_mps.core.settings import Settings
from kohya_mps.train import runs, start
from kohya_mps.train.runs import Ended, State
from kohya_mps.train.start import TrainOptions
from tests.support.reports import failed
from tests.support.stand_in_trainer import DIE, received, stand_in
from tests.support.training_runs import made_by_0_1_0
from tests.support.world import World


def test_all_files_of_a_training_are_in_its_run(installation: Settings, world: World) -> None:
    stand_in(installation)

    report = start.train(installation, world.toml(), TrainOptions())

    assert report.ok
    assert report.extra["state"] is State.FINISHED
    assert report.extra["losses"] == [1 / n for n in range(1, 7)]
    run = runs.find(world.root)
    words, directory, leads_session = received(run)
    assert words[words.index("--output_dir") + 1] == str(run.output)
    assert words[words.index("--config_file", words.index("launch") + 3) + 1] == str(run.settings)
    assert words[1:4] == ["-P", "-m", "accelerate.commands.accelerate_cli"]
    assert directory == str(world.root)
    assert leads_session
    assert run.settings.read_bytes() == world.toml().read_bytes()
    assert not list((world.root / "out").iterdir())


def test_the_base_model_decides_which_trainer_it_is(installation: Settings, world: World) -> None:
    world.safetensors(world.model, "sdxl")
    stand_in(installation)

    start.train(
        installation,
        world.toml(no_half_vae=True, network_train_unet_only=True),
        TrainOptions(preflight=False),
    )

    words, _, _ = received(runs.find(world.root))
    assert str(Installation(installation.home).sd_scripts / "sdxl_train_network.py") in words


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"network_module": None}, "network_module is not set"),
        ({"pretrained_model_name_or_path": "/nowhere/model.safetensors"}, "does not exist"),
        ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path is not set"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused_and_no_run_is_made(
    installation: Settings, world: World, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        start.train(installation, world.toml(**changed), TrainOptions())

    assert not (world.root / "runs").exists()


def test_flux_is_refused(installation: Settings, world: World) -> None:
    world.safetensors(world.model, "flux")

    with pytest.raises(UsageError, match="the base model is flux"):
        start.train(installation, world.toml(), TrainOptions())


def test_without_a_checkout_the_command_that_brings_it_is_named(installation: Settings, world: World) -> None:
    (Installation(installation.home).sd_scripts / "train_network.py").unlink()

    with pytest.raises(UsageError, match=r"no checkout[^$]*invoke clone"):
        start.train(installation, world.toml(), TrainOptions())


def test_what_is_known_to_fail_is_not_started(installation: Settings, world: World) -> None:
    stand_in(installation)

    with pytest.raises(StepFailed, match=r"xformers is chosen[^$]*--fix OUT[^$]*--no-preflight"):
        start.train(installation, world.toml(xformers=True, sdpa=False), TrainOptions())
    assert not (world.root / "runs").exists()


def test_without_preflight_it_is_started_anyway(installation: Settings, world: World) -> None:
    stand_in(installation)

    assert start.train(installation, world.toml(xformers=True, sdpa=False), TrainOptions(preflight=False)).ok


def test_warnings_are_printed_and_do_not_stop(
    installation: Settings, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(installation)

    assert start.train(installation, world.toml(caption_extension=".caption"), TrainOptions()).ok
    assert "caption_extension is .caption" in capfd.readouterr().err


def test_paths_are_relative_to_the_settings_or_to_the_working_directory(
    installation: Settings, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(installation)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = world.toml(train_data_dir="data", output_dir="out")
    monkeypatch.chdir(elsewhere)
    start.train(installation, file, TrainOptions())
    assert received(runs.find(file))[1] == str(world.root)

    moved = file.rename(elsewhere / "train.toml")
    monkeypatch.chdir(world.root)
    start.train(installation, moved, TrainOptions())
    assert received(runs.find(moved))[1] == str(world.root)


def test_a_killed_training_is_resumed_from_its_last_state(installation: Settings, world: World) -> None:
    stand_in(installation, DIE)
    killed = start.train(installation, world.toml(), TrainOptions())
    assert killed.extra["state"] is State.DIED
    assert "--resume` continues after step 3" in failed(killed)["training"].fix

    report = start.train(installation, world.root, TrainOptions(resume=True))

    run = runs.find(world.root)
    assert report.extra["state"] is State.FINISHED
    assert [step.step for step in run.steps()] == [1, 2, 3, 4, 5, 6]
    assert [again.step for again in run.record().resumed] == [3]
    assert len(list((world.root / "runs").iterdir())) == 1


def test_a_resumed_run_continues_with_the_settings_that_it_began_with(
    installation: Settings, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(installation, DIE)
    start.train(installation, world.toml(), TrainOptions())
    began_with = runs.find(world.root).settings.read_bytes()
    world.toml(learning_rate=5e-4)

    start.train(installation, world.root, TrainOptions(resume=True))

    assert runs.find(world.root).settings.read_bytes() == began_with
    assert "has changed since" in capfd.readouterr().err


def test_several_processes_use_the_configuration_of_the_home(installation: Settings, world: World) -> None:
    stand_in(installation)
    Installation(installation.home).distributed_config.write_text("num_processes: 2\n")

    start.train(installation, world.toml(), TrainOptions())

    words, _, _ = received(runs.find(world.root))
    assert words[words.index("--config_file") + 1] == str(Installation(installation.home).distributed_config)


def test_only_a_small_model_is_trained_through_the_shrinking_script(
    installation: Settings, world: World
) -> None:
    stand_in(installation)
    model = world.root / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    file = world.toml(pretrained_model_name_or_path="model")
    start.train(installation, file, TrainOptions(preflight=False))
    assert not any(word.endswith("small_trainer.py") for word in received(runs.find(world.root))[0])

    (model / start.SMALL_MARK).touch()
    start.train(installation, file, TrainOptions(preflight=False))
    assert any(word.endswith("small_trainer.py") for word in received(runs.find(world.root))[0])


def test_a_training_on_another_device_than_the_expected_one_is_a_failure(
    installation: Settings, world: World
) -> None:
    stand_in(installation, device="meta:0")

    report = start.train(installation, world.toml(), TrainOptions())

    assert report.extra["state"] is State.FINISHED
    assert set(failed(report)) == {"training device"}
    assert failed(report)["training device"].detail == f"meta:0, 1 process, expected {expected_device()}"


def test_a_run_of_version_0_1_0_is_resumed_to_its_end(installation: Settings, world: World) -> None:
    run = made_by_0_1_0(world.root, world.toml(), world.model)
    stand_in(installation)

    report = start.train(installation, world.root, TrainOptions(resume=True))

    assert report.extra["run"] == str(run.path)
    assert report.extra["state"] is State.FINISHED
    assert [step.step for step in run.steps()] == [1, 2, 3, 4, 5, 6]
    assert [resumption.step for resumption in run.record().resumed] == [2, 4]
    words, directory, _ = received(run)
    assert words[words.index("--output_name") + 1] == "old_cat"
    assert directory == str(world.root)


def test_the_record_says_what_the_training_was_started_with(installation: Settings, world: World) -> None:
    stand_in(installation)

    start.train(installation, world.toml(output_name="whiskers"), TrainOptions())

    record = runs.find(world.root).record()
    assert (record.name, record.family, record.trainer) == ("whiskers", "sd15", "train_network.py")
    assert (record.settings, record.base) == (str(world.root / "train.toml"), str(world.root))
    assert (record.profile, record.lock, record.generation) == (installation.profile_name, "lock", "one")
    assert record.expected_device == expected_device()
    assert record.command[-1] == str(runs.find(world.root).tensorboard)


def test_without_an_output_name_the_lora_has_the_name_of_the_directory(
    installation: Settings, world: World
) -> None:
    stand_in(installation)

    start.train(installation, world.toml(), TrainOptions())

    assert runs.find(world.root).record().name == world.root.name


def test_a_damaged_base_model_is_refused(installation: Settings, world: World) -> None:
    world.safetensors(world.model, cut=2)

    with pytest.raises(UsageError, match="pretrained_model_name_or_path"):
        start.train(installation, world.toml(), TrainOptions())


def test_a_run_that_is_resumed_in_another_environment_says_so(
    installation: Settings, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    made_by_0_1_0(world.root, world.toml(), world.model)
    stand_in(installation)

    start.train(installation, world.root, TrainOptions(resume=True))

    assert "began in 20260101-000000-validated and continues in one" in capfd.readouterr().err


def test_a_resumed_run_has_no_end_of_the_first_part(installation: Settings, world: World) -> None:
    run = made_by_0_1_0(world.root, world.toml(), world.model)
    stand_in(installation)

    start.train(installation, world.root, TrainOptions(resume=True, detach=True))

    assert not run.stop_file.exists()
    assert run.ended() is None or run.ended() != Ended(State.STOPPED, 4)
