"""``invoke new``: a project folder with everything that a training needs, ready to be trained.

The pictures are linked, not copied, into the folders that sd-scripts expects; the originals
stay untouched, because what the trainer writes beside pictures it writes beside the links.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.core.machine import expected_device
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import CONFIG, Settings, read_yaml
from kohya_mps.core.text import join_some
from kohya_mps.dataset.picture_files import OTHER_ENDINGS, TRAINER_ENDINGS
from kohya_mps.diagnose import base_model
from kohya_mps.diagnose.base_model import Form

from . import runs

IMAGES = "images"
PROMPTS = "prompts.txt"

_TEMPLATES = CONFIG / "templates"
_PRESETS = CONFIG / "presets.yaml"

_CAPTIONS = (".txt", ".caption")

# An epoch should show about this many pictures: fewer make the moving average mean little,
# more make the epochs few.
_EPOCH = 200
_MOST_REPEATS = 20
# Checkpoints and samples, as a part of the whole.
_PARTS = 8


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sample's size in pixels."""

    width: int
    height: int


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of ``config/presets.yaml``."""

    family: str
    model: str
    steps: int
    sample: Size


class NewProjectOptions(msgspec.Struct, frozen=True):
    """What ``invoke new`` was asked for."""

    place: Path
    images: Path
    model: str = ""
    preset: str = "sd15-lora"


class Picture(msgspec.Struct, frozen=True):
    """An original picture and its caption, if it has one."""

    path: Path
    caption: Path | None


class Folder(msgspec.Struct, frozen=True):
    """Pictures that are shown equally often."""

    repeats: int
    name: str
    pictures: tuple[Picture, ...]


def presets() -> dict[str, Preset]:
    """The presets by name.

    Raises:
        UsageError: the file has another shape.
    """
    return read_yaml(_PRESETS, dict[str, Preset])


def create(settings: Settings, wanted: NewProjectOptions) -> Report:
    """Make a project.

    Raises:
        UsageError: the place is taken, there are no pictures, or the model is not of the
            preset's family.
    """
    known = presets()
    if wanted.preset not in known:
        raise UsageError(f"there is no preset {wanted.preset!r}", f"accepted: {', '.join(known)}")
    preset = known[wanted.preset]
    place = Path(os.path.abspath(wanted.place.expanduser()))
    if os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir())):
        raise UsageError(f"{place} is there already", "choose another name, or move it away")
    name = re.sub(r"[^\w.-]+", "_", place.name)
    model = _model(wanted.model or preset.model, preset)
    found = folders(Path(os.path.abspath(wanted.images.expanduser())), name)
    made = place.with_name(f".{place.name}.unfinished")
    shutil.rmtree(made, ignore_errors=True)
    try:
        _arrange(made / IMAGES, found)
        (made / PROMPTS).write_text(_prompts(preset, found, name), encoding="utf-8")
        text = _settings_text(settings, wanted, preset, model, name, found)
        (made / runs.SETTINGS).write_text(text, encoding="utf-8")
        if place.exists():
            place.rmdir()
        made.rename(place)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    checks = (
        Check("project", Status.PASS, str(place / runs.SETTINGS)),
        *_picture_checks(wanted.images, found),
    )
    extra = {"project": str(place), "settings": str(place / runs.SETTINGS), "model": model}
    lines = (
        "",
        f"invoke train {shlex.quote(str(wanted.place))}",
        f"Its settings are in {wanted.place / runs.SETTINGS}; read them once.",
    )
    return Report(f"Project {name}", checks, extra, lines)


def _model(named: str, preset: Preset) -> str:
    """The base model as the settings will say it: a path in full, or a name on Hugging Face."""
    path = Path(os.path.abspath(Path(named).expanduser()))
    model = base_model.inspect(named, path)
    if model.form in (Form.MISSING, Form.DAMAGED):
        raise UsageError(f"--model: {model.detail}", "give a .safetensors file, or a name on Hugging Face")
    if model.family and model.family != preset.family:
        raise UsageError(
            f"--model: {named} is {model.family}, the preset is for {preset.family}",
            f"presets: {', '.join(f'{n} ({p.family})' for n, p in presets().items())}",
        )
    return named if model.form is Form.HUB else str(path)


def folders(images: Path, name: str) -> tuple[Folder, ...]:
    """The pictures of a folder, or of the folders named REPEATS_NAME in it.

    Raises:
        UsageError: there are none.
    """
    if not images.is_dir():
        raise UsageError(f"--images: {images} is no folder", "give the folder with your pictures")
    arranged = []
    for inner in sorted(path for path in images.iterdir() if path.is_dir()):
        named = re.fullmatch(r"([1-9]\d*)_(.+)", inner.name)
        if named and (pictures := tuple(_pictures(inner))):
            arranged.append(Folder(int(named[1]), named[2], pictures))
    if arranged:
        return tuple(arranged)
    pictures = tuple(_pictures(images))
    if not pictures:
        raise UsageError(
            f"--images: {images} holds no picture that the trainer reads",
            f"accepted: {', '.join(sorted(TRAINER_ENDINGS))}",
        )
    repeats = max(1, min(_MOST_REPEATS, _EPOCH // len(pictures)))
    return (Folder(repeats, name, pictures),)


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in TRAINER_ENDINGS and not path.name.startswith(".") and path.is_file():
            beside = (path.with_suffix(ending) for ending in _CAPTIONS)
            yield Picture(path, next((caption for caption in beside if caption.is_file()), None))


def _arrange(images: Path, found: tuple[Folder, ...]) -> None:
    for folder in found:
        inside = images / f"{folder.repeats}_{folder.name}"
        inside.mkdir(parents=True)
        taken: set[str] = set()
        for picture in folder.pictures:
            # a.png and a.jpg would share one caption, and what the trainer caches.
            stem = (
                picture.path.stem if picture.path.stem not in taken else picture.path.name.replace(".", "_")
            )
            taken.add(stem)
            # The trainer takes .png and .PNG, and passes over .Png.
            (inside / f"{stem}{picture.path.suffix.lower()}").symlink_to(picture.path)
            if picture.caption:
                (inside / f"{stem}.txt").symlink_to(picture.caption)


def _prompts(preset: Preset, found: tuple[Folder, ...], name: str) -> str:
    """Sample prompts: the first caption, and the name alone; the same seeds each time."""
    captions = [
        p.caption.read_text(encoding="utf-8", errors="replace")
        for f in found
        for p in f.pictures
        if p.caption
    ]
    first = next((line for caption in captions for line in caption.splitlines() if line.strip()), name)
    size = f"--w {preset.sample.width} --h {preset.sample.height}"
    prompts = list(dict.fromkeys((first.strip().replace(" --", " "), found[0].name)))
    lines = [f"{prompt} {size} --s 20 --l 7 --d {seed}" for seed, prompt in enumerate(prompts, 1)]
    return "\n".join(
        [
            "# One picture for each line: width, height, steps (s), guidance scale (l), seed (d), and",
            "# --n with what should not be in it.",
            *lines,
            "",
        ]
    )


def _settings_text(
    settings: Settings,
    wanted: NewProjectOptions,
    preset: Preset,
    model: str,
    name: str,
    found: tuple[Folder, ...],
) -> str:
    template = string.Template((_TEMPLATES / f"{wanted.preset}.toml").read_text(encoding="utf-8"))
    shown = sum(folder.repeats * len(folder.pictures) for folder in found)
    repeats = sorted({folder.repeats for folder in found})
    return template.substitute(
        model=_toml(model),
        name=name,
        name_text=_toml(name),
        pictures=sum(len(folder.pictures) for folder in found),
        repeats=" or ".join(f"{number} times" for number in repeats),
        per_epoch=shown,
        epochs=max(1, round(preset.steps / shown)),
        steps=preset.steps,
        warmup=preset.steps // 16,
        every=preset.steps // _PARTS,
        precision=settings.mixed_precision,
        device=expected_device(),
        profile=settings.profile_name,
    )


def _toml(text: str) -> str:
    """A TOML string."""
    import tomlkit

    return tomlkit.item(text).as_string()


def _picture_checks(images: Path, found: tuple[Folder, ...]) -> Iterator[Check]:
    pictures = [picture for folder in found for picture in folder.pictures]
    yield Check("pictures", Status.PASS, f"{len(pictures)} linked from {images}")
    unread = sorted(
        p.name for p in images.rglob("*") if p.suffix.lower() in OTHER_ENDINGS and not p.name.startswith(".")
    )
    if unread:
        fix = "save them as PNG or JPEG and make the project again (macOS: `sips -s format png FILE --out FILE.png`)"
        yield Check("left out", Status.WARN, f"the trainer does not read {join_some(unread)}", fix)
    bare = [picture.path.name for picture in pictures if picture.caption is None]
    if bare:
        detail = f"{len(bare)} of {len(pictures)} pictures have none: their folder's name is their caption"
        yield Check(
            "captions",
            Status.WARN,
            detail,
            "put a .txt of the same name beside each original, then make it again",
        )
    empty = [p.path.name for p in pictures if p.caption and not p.caption.read_bytes().strip()]
    if empty:
        yield Check("captions", Status.WARN, f"empty: {', '.join(empty[:5])}", "write what is in the picture")
    if not bare and not empty:
        yield Check("captions", Status.PASS, f"one for each of the {len(pictures)} pictures")
