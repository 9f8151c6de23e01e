"""The facts that rules judge, each from real files and options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core import machine, settings
from kohya_mps.diagnose import preflight
from kohya_mps.diagnose.inspection import inspect
from kohya_mps.diagnose.training_facts import FACTS, facts_of_sets
from kohya_mps.known_failures.rules import FactValues
from kohya_mps.trainer_config.config_file import read
from tests.support.world import World

HERE = settings.load()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def all_facts(
    world: World, file: Path, memory_gb: float | None = None, device: str = "mps"
) -> list[FactValues]:
    training = inspect(read(file), device, world.root)
    return facts_of_sets(training, preflight.target_for(HERE, device), memory_gb)


def facts(world: World, **values: Any) -> FactValues:
    (found,) = all_facts(world, world.toml(**values))
    return found


def test_the_names_are_those_that_rules_may_use(world: World) -> None:
    assert set(facts(world)) == FACTS


def test_a_good_training_has_no_problem(world: World) -> None:
    found = facts(world)

    problems = (
        "family_differs", "wrong_types", "macos_too_old", "output_problem", "missing_data", "ignored",
        "unsupported", "unreadable", "bad_captions", "other_ending", "vae_form", "vae_detail",
        "memory_gb", "comfortable_gb",
    )  # fmt: skip
    assert {name: found[name] for name in problems} == dict.fromkeys(problems)
    assert (found["is_training"], found["has_pictures"], found["caches_latents"]) == (True, True, True)
    assert (found["trainer"], found["family"], found["model_form"]) == (
        "train_network.py",
        "sd15",
        "safetensors",
    )
    assert (found["pictures"], found["unfoldered"], found["other_captions"]) == (1, 0, 0)
    assert found["model_has_fp16"] is False
    assert found["output_free_gb"] == pytest.approx(machine.free_disk_gb(world.root), rel=0.2)


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        ({"optimizer_type": "AdaFactor"}, "optimizer", "adafactor"),
        ({"optimizer_type": "AdaFactor"}, "optimizer_type", "AdaFactor"),
        ({"optimizer_type": None, "use_8bit_adam": True}, "optimizer_type", "adamw8bit"),
        ({"learning_rate": 0.5}, "first_learning_rate", 0.5),
        ({"learning_rate": 0.5, "unet_lr": 0.0}, "first_learning_rate", 0.0),
        ({"network_args": ['algo="LoKr"']}, "algorithm", "lokr"),
        ({}, "algorithm", ""),
        ({"cache_latents": False}, "caches_latents", False),
        ({"cache_latents": False, "cache_latents_to_disk": True}, "caches_latents", True),
        ({"v2": "a"}, "wrong_types", "v2 is 'a', not true or false"),
        ({"pretrained_model_name_or_path": None}, "model_form", None),
        ({"pretrained_model_name_or_path": None}, "model_has_fp16", None),
        ({"vae": "none"}, "vae_form", "missing"),
        ({"train_data_dir": None}, "has_pictures", False),
        ({"train_data_dir": None}, "pictures", None),
        ({"resolution": "768,512"}, "short_side", 512),
        ({"resolution": "768,512"}, "long_side", 768),
        ({"resolution": "wide"}, "short_side", None),
        ({"resolution": "wide"}, "long_side", None),
        ({"bucket_reso_steps": 96}, "steps_of_32", True),
        ({"bucket_reso_steps": 48}, "steps_of_32", False),
        # The limits of the buckets are rounded to whole steps, the least down, the most up.
        ({"min_bucket_reso": 300, "bucket_reso_steps": 64}, "least_bucket", 256),
        ({"min_bucket_reso": 320, "bucket_reso_steps": 64}, "least_bucket", 320),
        ({"max_bucket_reso": 1000, "bucket_reso_steps": 64}, "most_bucket", 1024),
        ({"max_bucket_reso": 1024, "bucket_reso_steps": 64}, "most_bucket", 1024),
        ({"max_bucket_reso": 1025, "bucket_reso_steps": 64}, "most_bucket", 1088),
        ({"min_bucket_reso": 300, "bucket_reso_steps": 0}, "least_bucket", 300),
        ({"max_bucket_reso": 1001, "bucket_reso_steps": -8}, "most_bucket", 1001),
        ({"min_bucket_reso": 301, "bucket_reso_steps": 1}, "least_bucket", 301),
    ],
)  # fmt: skip
def test_facts_follow_from_the_options(
    values: dict[str, Any], name: str, expected: Any, world: World
) -> None:
    assert facts(world, **values)[name] == expected


def test_a_comfortable_training_leaves_a_quarter_of_the_memory(world: World) -> None:
    (found,) = all_facts(world, world.toml(), memory_gb=16.0)

    assert (found["memory_gb"], found["comfortable_gb"]) == (16.0, 12.0)


def test_each_set_has_the_sizes_of_its_own_options(world: World) -> None:
    world.write(
        "sets.toml",
        "[general]\nmax_bucket_reso = 1000\n[[datasets]]\nresolution = [640, 512]\nbatch_size = 3\n[[datasets]]\n",
    )
    first, second = all_facts(world, world.toml(dataset_config="sets.toml", resolution="256"))

    assert (first["short_side"], first["long_side"], first["train_batch_size"]) == (512, 640, 3)
    assert (first["resolution"], first["most_bucket"]) == ("640,512", 1024)
    assert (second["short_side"], second["resolution"], second["train_batch_size"]) == (256, "256", 1)


def test_pictures_and_captions_are_counted_where_they_are_trained(world: World) -> None:
    world.picture(world.folder / "b.png")
    (world.folder / "b.caption").write_text("b")
    (world.folder / "c.gif").write_bytes(b"c")
    (world.folder / "d.png").write_bytes(b"no picture")
    (world.folder / "d.cap").write_text("d")
    world.picture(world.folder / "e.png")
    (world.folder / "e.caption").write_text("e")
    (world.folder / "a.txt").write_text("")
    (world.data / "loose.png").write_bytes(b"x")
    (world.data / "no").mkdir()
    world.picture(world.root / "reg" / "1_cat" / "r.png")
    (world.root / "reg" / "1_cat" / "r.txt").write_text("")
    (world.root / "reg" / "1_cat" / "s.heic").write_bytes(b"")
    found = facts(world, reg_data_dir="reg")

    assert (found["pictures"], found["unfoldered"], found["ignored"]) == (4, 1, "no")
    assert (found["other_captions"], found["other_ending"]) == (3, ".caption")
    assert found["unsupported"] == "c.gif, s.heic"
    assert found["bad_captions"] == f"{world.folder / 'a.txt'} is empty"
    assert found["unreadable"] == f"{world.folder / 'd.png'} (cannot identify image file 'd.png')"


def test_long_lists_and_items_are_shortened(world: World) -> None:
    for number in range(7):
        (world.data / f"no{number}").mkdir()
    (world.data / ("a" * 201)).mkdir()

    assert facts(world)["ignored"] == f"{'a' * 200}…, no0, no1, no2, no3, and 3 more"


def test_folders_that_are_missing_are_named(world: World) -> None:
    assert facts(world, train_data_dir="none")["missing_data"] == f"{world.root / 'none'} (train_data_dir)"
    assert facts(world, train_data_dir="none")["has_pictures"] is False


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("out/new/deep", None),
        ("model.safetensors/x", "{root}/model.safetensors/x cannot be made: {root}/model.safetensors is not a directory"),
        ("dangling", "{root}/dangling cannot be made: {root}/dangling is not a directory"),
    ],
)  # fmt: skip
def test_the_output_directory_has_to_be_one_or_become_one(
    output: str, problem: str | None, world: World
) -> None:
    (world.root / "dangling").symlink_to(world.root / "nowhere")
    found = facts(world, output_dir=output)

    assert found["output_problem"] == (problem and problem.format(root=world.root))
    assert (found["output_free_gb"] is None) is (problem is not None)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_an_output_directory_that_is_not_writable_is_named(world: World) -> None:
    (world.root / "out").chmod(0o555)

    assert facts(world)["output_problem"] == f"{world.root / 'out'} is not writable for you"


def test_without_an_output_directory_nothing_is_known_of_it(world: World) -> None:
    found = facts(world, output_dir=None)

    assert (found["output_problem"], found["output_free_gb"]) == (None, None)


@pytest.mark.parametrize(
    ("script", "family", "options", "problem"),
    [
        ("sdxl_train_network.py", "sd15", "", "sdxl_train_network.py is for sdxl, the base model is sd15"),
        ("train_network.py", "sdxl", "--v2", "train_network.py with v2 is for sd2, the base model is sdxl"),
        ("train_network.py", "sd15", "", None),
        ("sdxl_train_network.py", None, "", None),
    ],
)
def test_a_script_for_another_family_is_pointed_out(
    script: str, family: str | None, options: str, problem: str | None, world: World
) -> None:
    # What a repository is can only be guessed by its name.
    name = "someone/stable-diffusion-v1" if family is None else world.safetensors(world.model, family)
    text = f"python {script} --pretrained_model_name_or_path {name} --sdpa {options}"
    (found,) = all_facts(world, world.write("t.sh", text))

    assert found["family_differs"] == problem
    assert found["trainer"] == script


def test_a_dataset_configuration_is_no_training(world: World) -> None:
    (found,) = all_facts(world, world.write("sets.toml", "[[datasets]]\n"))

    assert found["is_training"] is False


@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON", "0", "", "off"])
def test_offline_is_what_hugging_face_takes_for_true(
    value: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", value)
    found = facts(world)
    is_offline = value in ("1", "true", "Yes", "ON")

    assert found["offline"] is is_offline
    assert found["offline_by"] == ("TRANSFORMERS_OFFLINE" if is_offline else "")
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert facts(world)["offline_by"] == ("HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE" if is_offline else "")


@pytest.mark.parametrize(
    ("directory", "variables", "values"),
    [
        ("hf/hub/models--openai--clip-vit-large-patch14/snapshots", {"HF_HOME": "hf"}, {}),
        (
            "hub/models--openai--clip-vit-large-patch14/snapshots",
            {"HF_HUB_CACHE": "hub", "HF_HOME": "hf"},
            {},
        ),
        ("tokens/openai_clip-vit-large-patch14", {"HF_HOME": "hf"}, {"tokenizer_cache_dir": "tokens"}),
    ],
)
def test_the_tokenizer_is_looked_for_where_the_trainer_does(
    directory: str,
    variables: dict[str, str],
    values: dict[str, str],
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(world.root / value))

    assert facts(world, **values)["tokenizer_at_hand"] is False
    (world.root / directory).mkdir(parents=True)
    assert facts(world, **values)["tokenizer_at_hand"] is True


@pytest.mark.parametrize(
    ("here", "device", "precision", "problem"),
    [
        ("13.6.1", "mps", "bf16", "bf16 on MPS needs macOS 14.0, and this is 13.6.1"),
        ("14.0", "mps", "bf16", None),
        ("9.0", "mps", "bf16", "bf16 on MPS needs macOS 14.0, and this is 9.0"),
        ("13.6.1", "mps", "no", None),
        ("13.6.1", "cuda", "bf16", None),
        ("", "mps", "bf16", None),
    ],
)
def test_a_precision_may_need_a_newer_macos(
    here: str, device: str, precision: str, problem: str | None, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.mac_ver", lambda: (here, ("", "", ""), ""))
    latest = settings.load(profile="latest")
    training = inspect(read(world.toml(mixed_precision=precision)), device, world.root)
    (found,) = facts_of_sets(training, preflight.target_for(latest, device), None)

    assert found["macos_too_old"] == problem
