"""``invoke new``: a project that can be trained as it is written, and originals that do not change."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.core.report import Report, Status
from kohya_mps.diagnose import preflight
from kohya_mps.diagnose.preflight import PreflightOptions
from kohya_mps.train import new_project
from kohya_mps.train.new_project import NewProjectOptions
from tests.support.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def photos(world: World) -> Path:
    """Pictures as people have them: flat, one ending in mixed case, one without a caption."""
    folder = world.root / "my photos"
    for name in ("a.png", "b.Jpg", "c.png"):
        world.picture(folder / name)
    (folder / "a.txt").write_text("a cat, on a mat\n")
    (folder / "b.caption").write_text("a cat in a box\n")
    return folder


def make(world: World, photos: Path, preset: str = "sd15-lora", name: str = "cats") -> Report:
    options = NewProjectOptions(world.root / name, photos, str(world.model), preset)
    return new_project.create(settings.load(), options)


def snapshot(folder: Path) -> list[tuple[str, bytes, int]]:
    return sorted((p.name, p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir())


def test_pictures_and_captions_are_linked_and_the_originals_untouched(world: World, photos: Path) -> None:
    before = snapshot(photos)

    make(world, photos)

    inside = world.root / "cats" / "images" / "20_cats"
    assert sorted(p.name for p in inside.iterdir()) == ["a.png", "a.txt", "b.jpg", "b.txt", "c.png"]
    assert all(p.is_symlink() for p in inside.iterdir())
    assert (inside / "b.txt").read_text() == "a cat in a box\n"
    assert snapshot(photos) == before


def test_missing_captions_and_pictures_that_the_trainer_does_not_read_are_warnings(
    world: World, photos: Path
) -> None:
    (photos / "d.heic").write_bytes(b"x")

    report = make(world, photos)

    warned = {c.name: c.detail for c in report.checks if c.status is Status.WARN}
    assert "d.heic" in warned["left out"]
    assert "1 of 3" in warned["captions"]


def test_folders_with_repeats_in_their_names_keep_them(world: World) -> None:
    make(world, world.data)

    assert (world.root / "cats" / "images" / "10_cat" / "a.png").is_symlink()


def test_two_pictures_of_one_name_do_not_share_a_file(world: World, photos: Path) -> None:
    world.picture(photos / "a.webp")

    make(world, photos)

    names = sorted(p.name for p in (world.root / "cats" / "images" / "20_cats").glob("a*"))
    assert names == ["a.png", "a.txt", "a_webp.txt", "a_webp.webp"]


@pytest.mark.parametrize("device", ["mps", "cuda", "cpu"])
@pytest.mark.parametrize("preset", list(new_project.presets()))
def test_every_preset_passes_preflight_as_written(
    world: World, photos: Path, preset: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (photos / "c.txt").write_text("a cat\n")
    (photos / "b.txt").write_text("a cat\n")
    world.safetensors(world.model, new_project.presets()[preset].family)
    make(world, photos, preset)

    file = world.root / "cats" / "train.toml"
    options = PreflightOptions(file, device=device, base=file.parent, memory_gb=64)
    checks = preflight.check(settings.load(), options).checks

    assert [c for c in checks if c.status is Status.FAIL] == []


def test_names_that_TOML_has_to_escape_come_back_whole(world: World, photos: Path) -> None:  # noqa: N802
    odd = world.root / 'mo"del \\ ü'
    world.model.rename(odd.with_suffix(".safetensors"))
    world.model = odd.with_suffix(".safetensors")

    make(world, photos, name="my cats")

    text = (world.root / "my cats" / "train.toml").read_text()
    values = tomllib.loads(text)
    assert values["pretrained_model_name_or_path"] == str(world.model)
    assert values["output_name"] == "my_cats"
    assert "$" not in text


def test_the_sample_prompts_begin_with_a_caption(world: World, photos: Path) -> None:
    make(world, photos)

    lines = (world.root / "cats" / "prompts.txt").read_text().splitlines()
    prompts = [line for line in lines if not line.startswith("#")]
    assert prompts[0].startswith("a cat, on a mat --w 512 --h 512")
    assert prompts[1].startswith("cats --w 512")


def test_a_directory_that_is_not_empty_is_left_alone(world: World, photos: Path) -> None:
    (world.root / "cats").mkdir()
    (world.root / "cats" / "mine").write_text("x")

    with pytest.raises(UsageError, match="already exists"):
        make(world, photos)

    assert os.listdir(world.root / "cats") == ["mine"]  # noqa: PTH208


def test_a_base_model_of_another_family_is_refused_and_nothing_made(world: World, photos: Path) -> None:
    world.safetensors(world.model, "sdxl")

    with pytest.raises(UsageError, match="is sdxl, the preset is for sd15"):
        make(world, photos)

    assert not (world.root / "cats").exists()


@pytest.mark.parametrize("images", ["nowhere", "empty"])
def test_a_folder_without_pictures_is_refused(world: World, images: str) -> None:
    (world.root / "empty").mkdir()

    with pytest.raises(UsageError, match="--images"):
        make(world, world.root / images)


def test_an_unknown_preset_is_refused_with_the_known_ones(world: World, photos: Path) -> None:
    with pytest.raises(UsageError, match=r"no preset 'flux-lora'[^$]*sd15-lora, sd15-locon, sdxl-lora"):
        make(world, photos, "flux-lora")


def test_an_empty_directory_is_filled(world: World, photos: Path) -> None:
    (world.root / "cats").mkdir()

    assert make(world, photos).ok
    assert (world.root / "cats" / "train.toml").is_file()


def test_a_project_that_cannot_be_finished_leaves_nothing(
    world: World, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_project, "_TEMPLATES", tmp_path / "nowhere")

    with pytest.raises(FileNotFoundError):
        make(world, photos)

    assert not list(world.root.glob("*cats*"))


@pytest.mark.parametrize(("count", "repeats"), [(1, 20), (10, 20), (20, 10), (150, 1), (300, 1)])
def test_an_epoch_has_about_two_hundred_steps(world: World, count: int, repeats: int) -> None:
    folder = world.root / "many"
    for number in range(count):
        (folder / f"{number}.png").parent.mkdir(exist_ok=True)
        (folder / f"{number}.png").touch()

    (found,) = new_project.folders(folder, "cats")

    assert (found.repeats, found.name, len(found.pictures)) == (repeats, "cats", count)


def test_empty_captions_are_a_warning(world: World, photos: Path) -> None:
    for name in ("a", "b", "c"):
        (photos / f"{name}.txt").write_text(" \n" if name == "c" else "a cat\n")

    captions = [check for check in make(world, photos).checks if check.name == "captions"]

    assert [(check.status, check.detail) for check in captions] == [(Status.WARN, "empty: c.png")]


def test_the_settings_say_how_long_the_training_is(world: World, photos: Path) -> None:
    make(world, photos)

    text = (world.root / "cats" / "train.toml").read_text()
    values = tomllib.loads(text)
    assert "# 3 pictures, shown 20 times: 60 steps an epoch, about 27 epochs." in text
    assert values["max_train_steps"] == 1600
    assert values["lr_warmup_steps"] == 100
    assert values["save_every_n_steps"] == values["sample_every_n_steps"] == 200


def test_a_name_on_hugging_face_stays_a_name(world: World, photos: Path) -> None:
    options = NewProjectOptions(world.root / "cats", photos)

    report = new_project.create(settings.load(), options)

    assert report.extra["model"] == new_project.presets()["sd15-lora"].model


def test_what_a_killed_run_left_is_replaced(world: World, photos: Path) -> None:
    (world.root / ".cats.unfinished" / "images" / "20_cats").mkdir(parents=True)

    assert make(world, photos).ok
    assert not (world.root / ".cats.unfinished").exists()


def test_hidden_files_are_no_pictures(world: World, photos: Path) -> None:
    (photos / "._a.png").write_bytes(b"what macOS writes beside a.png")

    make(world, photos)

    assert not list((world.root / "cats").rglob("._*"))


def test_a_caption_cannot_set_options_of_a_sample(world: World, photos: Path) -> None:
    (photos / "a.txt").write_text("a cat --w 4096\n")

    make(world, photos)

    assert "a cat w 4096 --w 512 --h 512" in (world.root / "cats" / "prompts.txt").read_text()
