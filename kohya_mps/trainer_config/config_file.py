"""The file that says how to train: a trainer's TOML, the GUI's JSON, or a pasted command."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError

from . import command, gui_json, toml
from .contents import ACCEPTED, Contents, Settings, read_text
from .trainer_options import NAMES


class Kind(StrEnum):
    """What wrote the file, which decides how its settings are named and typed."""

    TOML = "the TOML of a trainer"
    DATASET = "a dataset configuration"
    GUI = "settings saved by the GUI"
    GUI_DEFAULTS = "the defaults of the GUI (config.toml)"
    COMMAND = "a command line"


class ConfigFile(msgspec.Struct, frozen=True):
    """A training as a file describes it.

    ``settings`` have the trainers' names, whatever the file calls them. ``trainer`` is the
    script that the file is for, empty if the file does not say. ``notes`` are warnings
    about the file.
    """

    path: Path
    kind: Kind
    text: str
    settings: Settings
    trainer: str = ""
    notes: tuple[str, ...] = ()

    @property
    def numbers_as_text(self) -> bool:
        """Whether the program that reads the file turns strings into numbers."""
        return self.kind is not Kind.TOML


def read(path: Path) -> ConfigFile:
    """Read a file that says how to train.

    Raises:
        UsageError: it cannot be read, or has none of the three formats.
    """
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{path} is empty", ACCEPTED)
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        kind, contents = Kind.GUI, gui_json.read(path, gui_json.parse(path, text))
    elif command.is_command(path, text):
        kind, contents = Kind.COMMAND, command.read(path, text)
    else:
        kind, contents = _read_toml(path, text)
    return ConfigFile(path, kind, text, contents.settings, contents.trainer, contents.notes)


def _read_toml(path: Path, text: str) -> tuple[Kind, Contents]:
    try:
        data = toml.parse(path, text)
    except UsageError as error:
        if path.suffix.lower() == ".toml":
            raise
        raise UsageError(f"{path} has none of the three formats (as TOML: {error.what})", ACCEPTED) from error
    if isinstance(data.get("datasets"), list):
        return Kind.DATASET, Contents({"dataset_config": str(path)})
    settings = toml.flatten(data)
    if "accelerate_launch" in data or ("basic" in data and "model" in data):
        return Kind.GUI_DEFAULTS, gui_json.read(path, settings)
    if not (NAMES | gui_json.GUI_NAMES) & settings.keys():
        raise UsageError(f"{path} contains no setting that the trainers know", ACCEPTED)
    return Kind.TOML, Contents(settings, notes=_gui_names_in_trainer_toml(settings))


def _gui_names_in_trainer_toml(settings: Settings) -> tuple[str, ...]:
    found = [
        f"{gui_name} (the trainer's name: {name})"
        for gui_name, name in gui_json.TRAINER_NAMES.items()
        if gui_name in settings
    ]
    return (f"the trainers silently ignore these names of the GUI: {', '.join(found)}",) if found else ()


# Settings that name a file or a folder.
_PATHS = (
    "pretrained_model_name_or_path", "tokenizer_cache_dir", "vae", "train_data_dir", "reg_data_dir",
    "dataset_config", "in_json", "network_weights", "sample_prompts",
)  # fmt: skip


def base_directory(file: ConfigFile) -> Path:
    """The directory that the paths in the file are relative to.

    That is the file's own directory, unless a path exists only below the working directory.
    """
    own, here = Path(os.path.abspath(file.path)).parent, Path.cwd()
    values: list[Any] = [file.settings.get(name) for name in _PATHS]
    paths = [Path(value).expanduser() for value in values if isinstance(value, str)]
    missing = [path for path in paths if not (own / path).exists()]
    return here if any((here / path).exists() for path in missing) else own


def resolve_path(path: str, base: Path) -> Path:
    """A path from the settings, as the trainer understands it when it starts in ``base``."""
    return base / os.path.expanduser(path)
