"""Picture files: those that the trainer reads, and those that cannot be decoded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

# sd-scripts 2e0fcc50, library/train_util.py, line 104: all in lower case or all in upper case.
TRAINER_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EXACT_ENDINGS = tuple(e for lower in TRAINER_ENDINGS for e in (lower, lower.upper()))
# What cameras and browsers also save.
OTHER_ENDINGS = frozenset({".heic", ".heif", ".avif", ".gif", ".tif", ".tiff", ".jxl", ".jfif"})


class Unreadable(msgspec.Struct, frozen=True):
    """A picture that Pillow cannot decode, and Pillow's reason."""

    path: Path
    reason: str


def is_read_by_trainer(name: str) -> bool:
    """Whether the trainer takes a file of this name as a picture."""
    return name.endswith(_EXACT_ENDINGS)


def is_ignored_picture(name: str) -> bool:
    """Whether a file of this name is a picture that the trainer silently ignores."""
    ending = os.path.splitext(name)[1].lower()
    is_picture = ending in OTHER_ENDINGS or ending in TRAINER_ENDINGS
    return is_picture and not is_read_by_trainer(name) and not name.startswith(".")


def verify(pictures: Sequence[Path]) -> tuple[Unreadable, ...]:
    """Decode every picture with Pillow, as the trainer does, and return those that fail.

    JPEGs are decoded at an eighth of their size, which is faster and finds the same damage.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # about sizes and metadata: the trainer ignores them, too
        reasons = zip(pictures, pool.map(_problem, pictures), strict=True)
        return tuple(Unreadable(path, reason) for path, reason in reasons if reason)


def _problem(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (picture.width // 8, picture.height // 8))
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, MemoryError) as error:
        return str(error).replace(str(path), path.name) or type(error).__name__
    return ""
