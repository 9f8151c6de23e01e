"""The pictures and captions of a training, found as sd-scripts finds them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from kohya_mps.trainer_config.config_file import resolve_path
from kohya_mps.trainer_config.trainer_options import TrainerOptions

from . import dataset_config
from .dataset_config import FolderSettings
from .picture_files import is_ignored_picture, is_read_by_trainer

_CAPTION_ENDINGS = (".txt", ".caption", ".cap", ".tags", ".tag")
# A caption is a few hundred bytes; more than this is not read.
_LONGEST_CAPTION = 1_000_000


class Folder(msgspec.Struct, frozen=True):
    """A folder with pictures: how often an epoch shows each, and what is wrong with its files.

    ``without_caption`` counts pictures without a caption file. ``bad_captions`` describes
    captions that end the training. ``other_captions`` counts, by ending, pictures whose
    caption file has another ending than the chosen one. ``unsupported`` names pictures that
    the trainer ignores.
    """

    path: Path
    repeats: int
    regularization: bool = False
    pictures: tuple[Path, ...] = ()
    without_caption: int = 0
    bad_captions: tuple[str, ...] = ()
    other_captions: Mapping[str, int] = {}
    unsupported: tuple[str, ...] = ()


class PictureSet(msgspec.Struct, frozen=True):
    """Folders that are trained with the same resolution and batch size."""

    options: TrainerOptions
    folders: tuple[Folder, ...]

    @property
    def images_per_epoch(self) -> int:
        """Pictures in one epoch. Regularization pictures are repeated until they are as many."""
        trained = sum(f.repeats * len(f.pictures) for f in self.folders if not f.regularization)
        regularized = any(f.regularization and f.pictures for f in self.folders)
        return trained * 2 if regularized else trained


class Dataset(msgspec.Struct, frozen=True):
    """All pictures of a training, and what is wrong with their folders.

    ``missing`` names folders and files that do not exist. ``ignored`` names folders without
    a number of repeats in their name. ``unfoldered`` counts pictures beside the folders.
    """

    sets: tuple[PictureSet, ...] = ()
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unfoldered: int = 0

    @property
    def folders(self) -> list[Folder]:
        """Every folder of every set."""
        return [folder for picture_set in self.sets for folder in picture_set.folders]


def scan(options: TrainerOptions, base: Path) -> Dataset | None:
    """Find the pictures of a training; None if it names none.

    Args:
        options: the training's.
        base: what relative paths are relative to: the directory that the trainer starts in.
    """
    if options.dataset_config:
        return _scan_config(options, base)
    if not options.train_data_dir:
        return None
    root = resolve_path(options.train_data_dir, base)
    if not os.path.isdir(root):
        return Dataset(missing=(f"{root} (train_data_dir)",))
    if options.in_json:
        repeats = max(1, options.dataset_repeats)
        folder = _scan_folder(FolderSettings(root, repeats, options.caption_extension))
        return Dataset((PictureSet(options, (folder,)),))
    folders, ignored = _scan_named_folders(root, options.caption_extension, regularization=False)
    missing: tuple[str, ...] = ()
    if options.reg_data_dir:
        regular = resolve_path(options.reg_data_dir, base)
        if os.path.isdir(regular):
            more, also_ignored = _scan_named_folders(regular, options.caption_extension, regularization=True)
            folders, ignored = folders + more, ignored + also_ignored
        else:
            missing = (f"{regular} (reg_data_dir)",)
    unfoldered = sum(map(is_read_by_trainer, _names(root)))
    return Dataset((PictureSet(options, tuple(folders)),), missing, tuple(ignored), unfoldered)


def _scan_config(options: TrainerOptions, base: Path) -> Dataset:
    path = resolve_path(options.dataset_config, base)
    if not os.path.isfile(path):
        return Dataset(missing=(f"{path} (dataset_config)",))
    sets, missing = [], []
    for configured in dataset_config.read(path, options, base):
        present = [folder for folder in configured.folders if os.path.isdir(folder.path)]
        missing += [f"{f.path} (image_dir)" for f in configured.folders if f not in present]
        sets.append(PictureSet(configured.options, tuple(map(_scan_folder, present))))
    return Dataset(tuple(sets), tuple(missing))


def _scan_named_folders(
    root: Path, caption_extension: str, *, regularization: bool
) -> tuple[list[Folder], list[str]]:
    """The folders whose name begins with a number of repeats, and the names of the others."""
    folders, ignored = [], []
    for name in _names(root):
        if not os.path.isdir(root / name):
            continue
        try:
            repeats = int(name.split("_")[0])
        except ValueError:
            repeats = 0
        if repeats < 1:
            ignored.append(name)
        else:
            settings = FolderSettings(root / name, repeats, caption_extension, regularization)
            folders.append(_scan_folder(settings))
    return folders, ignored


def _scan_folder(settings: FolderSettings) -> Folder:
    names, ending = _names(settings.path), settings.caption_extension
    present = set(names)
    pictures = [name for name in names if is_read_by_trainer(name)]
    stems = [os.path.splitext(name)[0] for name in pictures]
    without = [stem for stem in stems if stem + ending not in present]
    captions = [settings.path / (stem + ending) for stem in stems if stem + ending in present]
    return Folder(
        path=settings.path,
        repeats=settings.repeats,
        regularization=settings.regularization,
        pictures=tuple(settings.path / name for name in pictures),
        without_caption=len(without),
        bad_captions=tuple(filter(None, map(_caption_problem, captions))),
        other_captions=Counter(_other_endings(without, present)),
        unsupported=tuple(filter(is_ignored_picture, names)),
    )


def _other_endings(stems: list[str], present: set[str]) -> Iterator[str]:
    """The ending of the first caption file that each picture has."""
    for stem in stems:
        if ending := next((e for e in _CAPTION_ENDINGS if stem + e in present), ""):
            yield ending


def _caption_problem(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_CAPTION)
        text.decode()
    except UnicodeDecodeError as error:
        # The last character may be cut off in the middle.
        return "" if error.start > _LONGEST_CAPTION - 4 else f"{path} is not UTF-8"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return "" if text else f"{path} is empty"


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
