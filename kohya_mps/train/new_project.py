"""``invoke new``: a project directory with everything that a training needs.

The pictures are linked, not copied, into the folders that sd-scripts expects. The trainer writes
files beside the pictures: here, beside the links. So the directory of the originals does not change.
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
import tomlkit

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

_CAPTION_ENDINGS = (".txt", ".caption")

# About as many steps as an epoch should have. With fewer, the average loss of an epoch says
# little; with more, there are only a few epochs.
_STEPS_PER_EPOCH = 200
_MOST_REPEATS = 20
# How often checkpoints are saved and samples drawn in a training.
_CHECKPOINTS = 8
# The part of the steps in which the learning rate rises.
_WARMUP = 16


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The size of a sample in pixels."""

    width: int
    height: int


class Preset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of ``config/presets.yaml``."""

    family: str
    model: str
    steps: int
    sample: Size


class NewProjectOptions(msgspec.Struct, frozen=True):
    """The options of ``invoke new``.

    ``path`` is the directory to make, ``images`` the directory of the pictures, ``model`` a path or
    a name on Hugging Face, and the preset's model when it is empty.
    """

    path: Path
    images: Path
    model: str = ""
    preset: str = "sd15-lora"


class Picture(msgspec.Struct, frozen=True):
    """An original picture and its caption file, if it has one."""

    path: Path
    caption: Path | None


class Folder(msgspec.Struct, frozen=True):
    """Pictures that an epoch shows equally often."""

    repeats: int
    name: str
    pictures: tuple[Picture, ...]


class _Project(msgspec.Struct, frozen=True):
    """A project that is about to be written; ``model`` as the settings name it."""

    name: str
    preset_name: str
    preset: Preset
    model: str
    folders: tuple[Folder, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for folder in self.folders for picture in folder.pictures]


def presets() -> dict[str, Preset]:
    """The presets by name.

    Raises:
        UsageError: ``config/presets.yaml`` is invalid.
    """
    return read_yaml(_PRESETS, dict[str, Preset])


def create(settings: Settings, options: NewProjectOptions) -> Report:
    """Make a project.

    Raises:
        UsageError: the directory is not empty, there are no pictures, or the model is not of the
            preset's family.
    """
    known = presets()
    if options.preset not in known:
        raise UsageError(f"there is no preset {options.preset!r}", f"accepted: {', '.join(known)}")
    preset = known[options.preset]
    path = Path(os.path.abspath(options.path.expanduser()))
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} already exists", "choose another name, or move it away")
    name = re.sub(r"[^\w.-]+", "_", path.name)
    model = _model(options.model or preset.model, preset)
    found = folders(Path(os.path.abspath(options.images.expanduser())), name)
    project = _Project(name, options.preset, preset, model, found)
    _write(settings, project, path)
    settings_file = path / runs.SETTINGS
    checks = (
        Check("project", Status.PASS, str(settings_file)),
        *_picture_checks(options.images, project.pictures),
    )
    extra = {"project": str(path), "settings": str(settings_file), "model": model}
    lines = (
        "",
        f"invoke train {shlex.quote(str(options.path))}",
        f"Its settings are in {options.path / runs.SETTINGS}; read them once.",
    )
    return Report(f"Project {name}", checks, extra, lines)


def _write(settings: Settings, project: _Project, path: Path) -> None:
    """Write the project beside its path, then rename it: it is never there in part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _link_pictures(project.folders, unfinished / IMAGES)
        (unfinished / PROMPTS).write_text(_prompts(project), encoding="utf-8")
        (unfinished / runs.SETTINGS).write_text(_settings_text(settings, project), encoding="utf-8")
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _model(name: str, preset: Preset) -> str:
    """The base model for the settings: an absolute path, or a name on Hugging Face."""
    path = Path(os.path.abspath(Path(name).expanduser()))
    model = base_model.inspect(name, path)
    if model.form in (Form.MISSING, Form.DAMAGED):
        raise UsageError(f"--model: {model.detail}", "give a .safetensors file, or a name on Hugging Face")
    if model.family and model.family != preset.family:
        raise UsageError(
            f"--model: {name} is {model.family}, the preset is for {preset.family}",
            f"presets: {', '.join(f'{n} ({p.family})' for n, p in presets().items())}",
        )
    return name if model.form is Form.HUB else str(path)


def folders(images: Path, name: str) -> tuple[Folder, ...]:
    """The pictures of a directory, or of the directories named REPEATS_NAME in it.

    Args:
        images: the directory.
        name: the caption of pictures without a caption file, where no directory has a name for it.

    Raises:
        UsageError: there are no pictures.
    """
    if not images.is_dir():
        raise UsageError(f"--images: {images} is not a folder", "give the folder with your pictures")
    arranged = []
    for inner in sorted(path for path in images.iterdir() if path.is_dir()):
        match = re.fullmatch(r"([1-9]\d*)_(.+)", inner.name)
        if match and (pictures := tuple(_pictures(inner))):
            arranged.append(Folder(int(match[1]), match[2], pictures))
    if arranged:
        return tuple(arranged)
    pictures = tuple(_pictures(images))
    if not pictures:
        raise UsageError(
            f"--images: {images} has no picture that the trainer reads",
            f"accepted: {', '.join(sorted(TRAINER_ENDINGS))}",
        )
    repeats = max(1, min(_MOST_REPEATS, _STEPS_PER_EPOCH // len(pictures)))
    return (Folder(repeats, name, pictures),)


def _pictures(folder: Path) -> Iterator[Picture]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in TRAINER_ENDINGS and not path.name.startswith(".") and path.is_file():
            captions = (path.with_suffix(ending) for ending in _CAPTION_ENDINGS)
            yield Picture(path, next((caption for caption in captions if caption.is_file()), None))


def _link_pictures(found: tuple[Folder, ...], images: Path) -> None:
    for folder in found:
        directory = images / f"{folder.repeats}_{folder.name}"
        directory.mkdir(parents=True)
        taken: set[str] = set()
        for picture in folder.pictures:
            stem = picture.path.stem
            if stem in taken:
                # a.png and a.jpg would share a caption and the trainer's cached latents.
                stem = picture.path.name.replace(".", "_")
            taken.add(stem)
            # The trainer reads .png and .PNG, but not .Png.
            (directory / f"{stem}{picture.path.suffix.lower()}").symlink_to(picture.path)
            if picture.caption:
                (directory / f"{stem}.txt").symlink_to(picture.caption)


def _prompts(project: _Project) -> str:
    """Sample prompts: the first caption and the name alone, with the same seeds each time."""
    captions = (
        picture.caption.read_text(encoding="utf-8", errors="replace")
        for picture in project.pictures
        if picture.caption
    )
    lines = (line.strip() for caption in captions for line in caption.splitlines() if line.strip())
    first = next(lines, project.name).replace(" --", " ")
    sample = project.preset.sample
    options = f"--w {sample.width} --h {sample.height} --s 20 --l 7"
    prompts = dict.fromkeys((first, project.folders[0].name))
    return (
        "# Each line is a picture: width (w), height (h), steps (s), guidance scale (l) and seed (d).\n"
        "# --n names what should not be in it.\n"
        + "".join(f"{prompt} {options} --d {seed}\n" for seed, prompt in enumerate(prompts, 1))
    )


def _settings_text(settings: Settings, project: _Project) -> str:
    template = string.Template((_TEMPLATES / f"{project.preset_name}.toml").read_text(encoding="utf-8"))
    steps = project.preset.steps
    per_epoch = sum(folder.repeats * len(folder.pictures) for folder in project.folders)
    repeats = sorted({folder.repeats for folder in project.folders})
    return template.substitute(
        model=_toml(project.model),
        name=project.name,
        name_text=_toml(project.name),
        pictures=len(project.pictures),
        repeats=" or ".join(f"{number} times" for number in repeats),
        per_epoch=per_epoch,
        epochs=max(1, round(steps / per_epoch)),
        steps=steps,
        warmup=steps // _WARMUP,
        every=steps // _CHECKPOINTS,
        precision=settings.mixed_precision,
        device=expected_device(),
        profile=settings.profile_name,
    )


def _toml(text: str) -> str:
    """A TOML string."""
    return tomlkit.item(text).as_string()


def _picture_checks(images: Path, pictures: list[Picture]) -> Iterator[Check]:
    """Which pictures are linked, which the trainer does not read, and which captions are missing."""
    yield Check("pictures", Status.PASS, f"{len(pictures)} linked from {images}")
    unread = sorted(
        p.name for p in images.rglob("*") if p.suffix.lower() in OTHER_ENDINGS and not p.name.startswith(".")
    )
    if unread:
        fix = "save them as PNG or JPEG and make the project again (macOS: `sips -s format png FILE --out FILE.png`)"
        yield Check("left out", Status.WARN, f"the trainer does not read {join_some(unread)}", fix)
    without = sum(picture.caption is None for picture in pictures)
    if without:
        detail = f"{without} of {len(pictures)} pictures have none: their folder's name is their caption"
        fix = "put a .txt of the same name beside each original, then make the project again"
        yield Check("captions", Status.WARN, detail, fix)
    empty = [p.path.name for p in pictures if p.caption and not p.caption.read_bytes().strip()]
    if empty:
        yield Check("captions", Status.WARN, f"empty: {join_some(empty)}", "write what is in the picture")
    if not without and not empty:
        yield Check("captions", Status.PASS, f"one for each of the {len(pictures)} pictures")
