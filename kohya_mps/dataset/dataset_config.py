"""The file that ``dataset_config`` names: sets of folders, each with settings of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config import toml
from kohya_mps.trainer_config.config_file import resolve_path
from kohya_mps.trainer_config.contents import read_text
from kohya_mps.trainer_config.trainer_options import NAMES, TrainerOptions, parse_options

# Names that differ from the command line's (library/config_util.py, line 247).
_OPTION_NAMES = {"batch_size": "train_batch_size"}


class FolderSettings(msgspec.Struct, frozen=True):
    """A folder with pictures, and how it is used.

    ``repeats`` is how often an epoch shows each picture, ``caption_extension`` the ending
    of the caption files.
    """

    path: Path
    repeats: int
    caption_extension: str
    regularization: bool = False


class SetSettings(msgspec.Struct, frozen=True):
    """Folders that are trained with the same options."""

    options: TrainerOptions
    folders: tuple[FolderSettings, ...]


def read(path: Path, options: TrainerOptions, base: Path) -> tuple[SetSettings, ...]:
    """Read a dataset configuration.

    Args:
        path: the file, in TOML or JSON.
        options: the training's; the file overrides them for each set.
        base: what relative paths are relative to.

    Raises:
        UsageError: it is neither TOML nor JSON.
    """
    config = _parse(path)
    general = config["general"] if isinstance(config.get("general"), dict) else {}
    return tuple(
        SetSettings(
            _override(options, general, table),
            tuple(
                _folder({**general, **table, **subset}, options, base)
                for subset in _tables(table.get("subsets"))
            ),
        )
        for table in _tables(config.get("datasets"))
    )


def _parse(path: Path) -> dict[str, Any]:
    text = read_text(path)
    if path.suffix.lower() == ".toml":
        return toml.parse(path, text)
    try:
        config = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path} is neither TOML nor JSON: {error}", "check dataset_config") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} contains no datasets", "check dataset_config")
    return config


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def _folder(settings: Mapping[str, Any], options: TrainerOptions, base: Path) -> FolderSettings:
    repeats = settings.get("num_repeats", 1)
    return FolderSettings(
        path=resolve_path(str(settings.get("image_dir", "")), base),
        repeats=repeats if isinstance(repeats, int) and 0 < repeats < 1_000_000 else 1,
        caption_extension=str(settings.get("caption_extension", options.caption_extension)),
        regularization=settings.get("is_reg") is True,
    )


def _override(options: TrainerOptions, *layers: Mapping[str, Any]) -> TrainerOptions:
    """The options, overridden by what the layers name. The last layer wins."""
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {_OPTION_NAMES.get(name, name): value for name, value in layer.items()}
    if isinstance(resolution := values.get("resolution"), list):
        values["resolution"] = ",".join(map(str, resolution))
    parsed, _ = parse_options(values, numbers_as_text=True)
    return msgspec.structs.replace(options, **{n: getattr(parsed, n) for n in values if n in NAMES})
