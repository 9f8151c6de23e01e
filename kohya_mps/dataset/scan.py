"""The training pictures: folders as sd-scripts finds them, captions, files that cannot be read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config import toml
from kohya_mps.trainer_config.config_file import resolve_path
from kohya_mps.trainer_config.contents import read_text
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options

# sd-scripts 2e0fcc50, library/train_util.py, line 104: small or capital letters, no mixture.
SMALL_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_ENDINGS = tuple(e for small in SMALL_ENDINGS for e in (small, small.upper()))
# What cameras and browsers save besides.
OTHER_PICTURES = frozenset({".heic", ".heif", ".avif", ".gif", ".tif", ".tiff", ".jxl", ".jfif"})
_CAPTIONS = (".txt", ".caption", ".cap", ".tags", ".tag")


class Folder(msgspec.Struct, frozen=True):
    """One folder of pictures: how often each is shown, and what is beside them.

    ``bad_captions`` says which captions end the training, ``other_captions`` counts pictures
    whose caption has another ending than the chosen one, by that ending, and ``unsupported``
    names pictures that the trainer passes over for theirs.
    """

    path: Path
    repeats: int
    regularization: bool = False
    pictures: tuple[Path, ...] = ()
    without_caption: int = 0
    bad_captions: tuple[str, ...] = ()
    other_captions: Mapping[str, int] = {}
    unsupported: tuple[str, ...] = ()


class Subset(msgspec.Struct, frozen=True):
    """Folders that are trained at one resolution and batch size."""

    settings: TrainerOptions
    folders: tuple[Folder, ...]

    @property
    def images_per_epoch(self) -> int:
        """Pictures in one epoch. Regularization pictures are repeated until they are as many."""
        train = sum(f.repeats * len(f.pictures) for f in self.folders if not f.regularization)
        regular = any(f.regularization and f.pictures for f in self.folders)
        return train * 2 if regular else train


class Dataset(msgspec.Struct, frozen=True):
    """All that a training is given to see, and what was wrong with finding it.

    ``missing`` are folders and files that do not exist, ``ignored`` folders without a
    number of repeats in their name, ``unfoldered`` pictures that lie beside those folders.
    """

    sets: tuple[Subset, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unfoldered: int = 0

    @property
    def folders(self) -> list[Folder]:
        """Every folder of every set."""
        return [folder for data_set in self.sets for folder in data_set.folders]


class Verified(msgspec.Struct, frozen=True):
    """What opening the pictures showed: those that cannot be read, and why."""

    unreadable: tuple[tuple[Path, str], ...]


def scan(training: TrainerOptions, base: Path) -> Dataset | None:
    """Find the pictures of a training; nothing when it names none.

    Args:
        training: its settings.
        base: what relative paths are relative to: the directory that the trainer starts in.
    """
    if training.dataset_config:
        return _from_config(training, base)
    if not training.train_data_dir:
        return None
    root = resolve_path(training.train_data_dir, base)
    if not os.path.isdir(root):
        return Dataset(missing=(f"{root} (train_data_dir)",))
    if training.in_json:
        folder = _look(root, 1, False, training.caption_extension)
        repeated = msgspec.structs.replace(folder, repeats=max(1, training.dataset_repeats))
        return Dataset((Subset(training, (repeated,)),))
    folders, ignored = _with_repeats(root, False, training.caption_extension)
    missing: tuple[str, ...] = ()
    if training.reg_data_dir:
        regular = resolve_path(training.reg_data_dir, base)
        if os.path.isdir(regular):
            more, also_ignored = _with_repeats(regular, True, training.caption_extension)
            folders, ignored = folders + more, ignored + also_ignored
        else:
            missing = (f"{regular} (reg_data_dir)",)
    unfoldered = sum(name.endswith(_ENDINGS) for name in _names(root))
    return Dataset((Subset(training, tuple(folders)),), missing, tuple(ignored), unfoldered)


def verify(pictures: Sequence[Path]) -> Verified:
    """Open every picture with Pillow, as the trainer does, and decode it: JPEGs at an eighth."""
    from PIL import Image

    def problem(path: Path) -> str:
        try:
            with Image.open(path) as picture:
                picture.draft("RGB", (picture.width // 8, picture.height // 8))
                picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError) as error:
            return str(error).replace(str(path), path.name) or type(error).__name__
        return ""

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's about sizes and metadata: the trainer goes on, too
        found = zip(pictures, pool.map(problem, pictures), strict=True)
        return Verified(tuple((path, reason) for path, reason in found if reason))


def _with_repeats(root: Path, regularization: bool, ending: str) -> tuple[list[Folder], list[str]]:
    """The folders whose name begins with a number of repeats, and the names of the others."""
    folders, ignored = [], []
    for name in _names(root):
        if not os.path.isdir(root / name):
            continue
        number = name.split("_")[0]
        try:
            repeats = int(number)
        except ValueError:
            repeats = 0
        if repeats < 1:
            ignored.append(name)
        else:
            folders.append(_look(root / name, repeats, regularization, ending))
    return folders, ignored


def _look(path: Path, repeats: int, regularization: bool, ending: str) -> Folder:
    names = _names(path)
    present = set(names)
    pictures = [name for name in names if name.endswith(_ENDINGS)]
    stems = [os.path.splitext(name)[0] for name in pictures]
    bare = [stem for stem in stems if stem + ending not in present]
    others = Counter(
        other for stem in bare if (other := next((e for e in _CAPTIONS if stem + e in present), ""))
    )
    captions = [path / (stem + ending) for stem in stems if stem + ending in present]
    unsupported = [n for n in names if not n.endswith(_ENDINGS) and _is_picture(n)]
    return Folder(
        path=path,
        repeats=repeats,
        regularization=regularization,
        pictures=tuple(path / name for name in pictures),
        without_caption=len(bare),
        bad_captions=tuple(problem for caption in captions if (problem := _caption_problem(caption))),
        other_captions=dict(others),
        unsupported=tuple(unsupported),
    )


def _caption_problem(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(1_000_000)
        text.decode()
    except UnicodeDecodeError as error:
        return "" if error.start > 999_990 else f"{path} is not UTF-8"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return "" if text else f"{path} is empty"


def _is_picture(name: str) -> bool:
    ending = Path(name).suffix.lower()
    return not name.startswith(".") and (ending in OTHER_PICTURES or ending in _ENDINGS)


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _from_config(training: TrainerOptions, base: Path) -> Dataset:
    path = resolve_path(training.dataset_config, base)
    if not os.path.isfile(path):
        return Dataset(missing=(f"{path} (dataset_config)",))
    sets: list[Subset] = []
    missing: list[str] = []
    config = _read_config(path)
    general = config["general"] if isinstance(config.get("general"), dict) else {}
    for data_set in _tables(config.get("datasets")):
        settings = _overridden(training, general, data_set)
        folders = []
        for subset in _tables(data_set.get("subsets")):
            chosen = {**general, **data_set, **subset}
            directory = resolve_path(str(chosen.get("image_dir", "")), base)
            if not os.path.isdir(directory):
                missing.append(f"{directory} (image_dir)")
                continue
            ending = str(chosen.get("caption_extension", training.caption_extension))
            repeats = chosen.get("num_repeats", 1)
            folders.append(
                _look(
                    directory,
                    repeats if isinstance(repeats, int) and 0 < repeats < 1_000_000 else 1,
                    chosen.get("is_reg") is True,
                    ending,
                )
            )
        sets.append(Subset(settings, tuple(folders)))
    return Dataset(tuple(sets), tuple(missing))


def _read_config(path: Path) -> dict[str, Any]:
    text = read_text(path)
    if path.suffix.lower() == ".toml":
        return toml.parse(path, text)
    try:
        found = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"{path}: is neither TOML nor JSON: {error}", "check dataset_config") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: holds no datasets", "check dataset_config")
    return found


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


# What a dataset configuration calls otherwise (library/config_util.py, line 247).
_CONFIG_NAMES = {"batch_size": "train_batch_size"}


def _overridden(training: TrainerOptions, *layers: Mapping[str, Any]) -> TrainerOptions:
    values: dict[str, Any] = {}
    for layer in layers:
        values |= {_CONFIG_NAMES.get(name, name): value for name, value in layer.items()}
    sides = values.get("resolution")
    if isinstance(sides, int):
        values["resolution"] = str(sides)
    elif isinstance(sides, list):
        values["resolution"] = ",".join(map(str, sides))
    settings, _ = parse_options(values, numbers_as_text=True)
    chosen = {n: getattr(settings, n) for n in values if n in TrainerOptions.__struct_fields__}
    return msgspec.structs.replace(training, **chosen)
