"""A world of pictures and settings, and an installation whose trainer a test replaces."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import Settings
from kohya_mps.install import generations, inventory
from kohya_mps.install.generations import Generation, Manifest
from tests.support.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Pictures, a base model, and settings that name them."""
    return World(tmp_path)


@pytest.fixture
def installation(tmp_path: Path) -> Settings:
    """A home with an active environment, whose interpreter is empty, and with the names of the trainers."""
    home = Installation(tmp_path / "home")
    generation = Generation(home.generations / "one")
    generation.python.parent.mkdir(parents=True)
    generation.python.touch()
    generation.python.chmod(0o755)
    generation.complete(
        Manifest("validated", "lock", "3.11.9", "/usr/bin/python3.11", inventory.take(generation.venv), 1.0)
    )
    generation.accelerate_config.write_text("use_cpu: false\n")
    generations.activate(home, generation)
    subprocess.run(["git", "init", "--quiet", str(home.root)], check=True)
    home.sd_scripts.mkdir()
    for name in ("train_network.py", "sdxl_train_network.py"):
        (home.sd_scripts / name).write_text("")
    return msgspec.structs.replace(settings.load(), home=home.root)
