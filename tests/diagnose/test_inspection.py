"""What a configuration file says, together with the files that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.diagnose.base_model import Form
from kohya_mps.diagnose.estimate import Estimate
from kohya_mps.diagnose.inspection import Inspection, inspect, script_family
from kohya_mps.trainer_config.config_file import read
from kohya_mps.trainer_config.trainer_options import TrainerOptions
from tests.support.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def inspected(world: World, **values: Any) -> Inspection:
    return inspect(read(world.toml(**values)), "mps", world.root)


def test_every_file_that_is_named_is_looked_at(world: World) -> None:
    found = inspected(world, vae="none.safetensors")

    assert found.model is not None
    assert (found.model.form, found.model.family) == (Form.SAFETENSORS, "sd15")
    assert found.vae is not None
    assert found.vae.form is Form.MISSING
    assert found.dataset is not None
    assert found.estimate.pictures == 10
    assert found.estimate.peak_gb is not None


def test_what_is_not_named_is_none(world: World) -> None:
    found = inspected(world, pretrained_model_name_or_path=None, train_data_dir=None)

    assert (found.model, found.vae, found.dataset) == (None, None, None)
    assert found.option_sets == [found.options]


def test_a_value_of_a_wrong_type_is_reported_and_used_as_it_was_meant(world: World) -> None:
    found = inspected(world, resolution=768, train_batch_size="2", network_dim="eight")

    assert {wrong.name for wrong in found.wrong_types} == {"resolution", "train_batch_size", "network_dim"}
    assert found.options.resolution == "768"
    assert found.options.train_batch_size == 2
    assert found.options.network_dim is None


def test_each_set_of_pictures_has_its_options(world: World) -> None:
    world.write("sets.toml", "[[datasets]]\nresolution = 640\n[[datasets]]\nbatch_size = 3\n")
    found = inspected(world, dataset_config="sets.toml")

    assert [(o.resolution, o.train_batch_size) for o in found.option_sets] == [("640", 1), ("512,512", 3)]


def test_a_dataset_configuration_alone_says_nothing_of_the_training(world: World) -> None:
    world.write("sets.toml", f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{world.folder}"\n')
    found = inspect(read(world.root / "sets.toml"), "mps", world.root)

    assert found.estimate == Estimate(pictures=1)


@pytest.mark.parametrize(
    ("trainer", "v2", "family"),
    [
        ("sdxl_train_network.py", False, "sdxl"),
        ("flux_train_network.py", True, "flux"),
        ("sd3_train.py", False, "sd3"),
        ("train_network.py", False, "sd15"),
        ("train_network.py", True, "sd2"),
        ("", True, ""),
    ],
)
def test_a_script_is_for_one_family(trainer: str, v2: bool, family: str) -> None:
    assert script_family(trainer, TrainerOptions(v2=v2)) == family


@pytest.mark.parametrize(
    ("model", "values", "family"),
    [
        ("sdxl", {}, "sdxl"),
        ("flux", {"v2": True}, "flux"),
        (None, {}, "sd15"),
        (None, {"v2": True}, "sd2"),
        (None, {"network_module": "networks.lora_flux"}, "flux"),
    ],
)
def test_without_a_script_the_base_model_and_then_the_options_decide(
    model: str | None, values: dict[str, Any], family: str, world: World
) -> None:
    if model:
        world.safetensors(world.model, model)
    else:
        values = {**values, "pretrained_model_name_or_path": "someone/something"}

    assert inspected(world, **values).family == family


def test_a_script_decides_before_the_base_model(world: World) -> None:
    text = f"python sdxl_train_network.py --pretrained_model_name_or_path {world.model} --sdpa"
    found = inspect(read(world.write("t.sh", text)), "mps", world.root)

    assert found.family == "sdxl"
