from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from devtools.bench import training
from kohya_mps.core.errors import UsageError
from tests.support.installs import make_settings


def test_without_an_installation_it_says_what_brings_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        training.training(make_settings(tmp_path / "home"), tmp_path, 1)
    assert "invoke setup" in refusal.value.fix


def test_the_settings_of_the_training_are_toml_that_names_the_model() -> None:
    settings = tomllib.loads(training.SETTINGS.format(model="/models/small"))
    assert settings["pretrained_model_name_or_path"] == "/models/small/model"
    assert settings["max_train_steps"] > 1  # a pace needs two steps
