"""``invoke train``: nothing is started that is known to fail, and a failure is explained."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest
from world import World

from kohya_mps import generations, inventory, settings, train
from kohya_mps.errors import StepFailed
from kohya_mps.generations import Generation, Manifest
from kohya_mps.home import Home
from kohya_mps.settings import Settings

# Stands in for the trainer's interpreter: says what it was given and ends as a trainer on a Mac would.
INTERPRETER = """#!/bin/sh
echo "$@" > "{said}"
pwd >> "{said}"
echo "ValueError: fp16 mixed precision requires a GPU (not 'mps')."
exit 1
"""


@pytest.fixture
def said(tmp_path: Path) -> Path:
    return tmp_path / "said"


@pytest.fixture
def here(tmp_path: Path, said: Path) -> Settings:
    home = Home(tmp_path / "home")
    generation = Generation(home.generations / "one")
    generation.python.parent.mkdir(parents=True)
    generation.python.write_text(INTERPRETER.format(said=said))
    generation.python.chmod(0o755)
    generation.complete(
        Manifest("validated", "lock", "3.11.9", "/usr/bin/python3.11", inventory.take(generation.venv), 1.0)
    )
    generations.activate(home, generation)
    subprocess.run(["git", "init", "--quiet", str(home.root)], check=True)
    home.sd_scripts.mkdir()
    (home.sd_scripts / train.TRAINER).write_text("")
    return msgspec.structs.replace(settings.load(), home=home.root)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_is_known_to_fail_is_not_started(here: Settings, world: World, said: Path) -> None:
    with pytest.raises(StepFailed, match=r"xformers is chosen[^$]*--fix OUT[^$]*--no-preflight"):
        train.train(here, world.toml(xformers=True, sdpa=False))

    assert not said.exists()


def test_without_preflight_it_is_started_all_the_same(here: Settings, world: World, said: Path) -> None:
    file = world.toml(xformers=True, sdpa=False)

    assert train.train(here, file, check=False) == 1
    assert f"--config_file {file}" in said.read_text()


def test_a_good_training_starts_where_the_user_stands_and_its_end_is_explained(
    here: Settings,
    world: World,
    said: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world.root)
    file = world.toml(train_data_dir="data", output_dir="out")

    assert train.train(here, file) == 1
    assert said.read_text().splitlines()[-1] == str(world.root)
    assert "mend:  `mixed_precision" in capfd.readouterr().err


def test_warnings_are_told_and_do_not_stop(
    here: Settings, world: World, said: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train.train(here, world.toml(caption_extension=".caption"))

    assert said.exists()
    assert "caption_extension is .caption" in capfd.readouterr().err


def test_a_base_model_for_another_trainer_is_seen(here: Settings, world: World, said: Path) -> None:
    world.safetensors(world.model, "sdxl")

    with pytest.raises(StepFailed, match=r"train_network.py is for sd15, the base model is sdxl"):
        train.train(here, world.toml(no_half_vae=True))
    assert not said.exists()
