"""Folders, captions and pictures as the trainer finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.dataset.scan import Dataset, Folder, PictureSet, scan
from kohya_mps.trainer_config.trainer_options import TrainerOptions
from tests.support.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def scanned(world: World, **values: Any) -> Dataset:
    options = TrainerOptions(**{"train_data_dir": "data", "caption_extension": ".txt", **values})
    found = scan(options, world.root)
    assert found is not None
    return found


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_training_without_pictures_has_no_dataset(world: World) -> None:
    assert scan(TrainerOptions(), world.root) is None


def test_folders_are_named_by_their_repeats_and_others_are_ignored(world: World) -> None:
    for name in ("3_dog", "1_one", "07", "0_no", "-1_no", "cat", "x_2"):
        touch(world.data / name / "a.png")
    touch(world.data / "5_file")
    found = scanned(world)

    assert [(folder.path.name, folder.repeats) for folder in found.folders] == [
        ("07", 7),
        ("10_cat", 10),
        ("1_one", 1),
        ("3_dog", 3),
    ]
    assert found.ignored == ("-1_no", "0_no", "cat", "x_2")
    assert found.missing == ()


def test_pictures_beside_the_folders_are_counted(world: World) -> None:
    for name in ("a.png", "b.JPG", "c.txt", "d.heic"):
        touch(world.data / name)

    assert scanned(world).unfoldered == 2
    assert scanned(World(world.root / "other")).unfoldered == 0


def test_a_missing_folder_is_named_with_its_setting(world: World) -> None:
    assert scanned(world, train_data_dir="none") == Dataset(
        missing=(f"{world.root / 'none'} (train_data_dir)",)
    )
    found = scanned(world, reg_data_dir="none")
    assert found.missing == (f"{world.root / 'none'} (reg_data_dir)",)
    assert len(found.folders) == 1
    assert scanned(world, dataset_config="none").missing == (f"{world.root / 'none'} (dataset_config)",)


def test_regularization_pictures_are_repeated_until_they_are_as_many(world: World) -> None:
    touch(world.root / "reg" / "2_cat" / "r.png")
    (world.root / "reg" / "junk").mkdir()
    found = scanned(world, reg_data_dir="reg")

    assert [folder.regularization for folder in found.folders] == [False, True]
    assert found.ignored == ("junk",)
    assert found.sets[0].images_per_epoch == 20


def test_an_epoch_shows_each_picture_as_often_as_its_folder_says() -> None:
    two = (Path("a.png"), Path("b.png"))
    folders = (Folder(Path("x"), 3, pictures=two), Folder(Path("y"), 5, pictures=two[:1]))
    empty = Folder(Path("r"), 9, regularization=True)

    assert PictureSet(TrainerOptions(), folders).images_per_epoch == 11
    assert PictureSet(TrainerOptions(), (*folders, empty)).images_per_epoch == 11


def test_with_in_json_the_folder_itself_has_the_pictures(world: World) -> None:
    touch(world.data / "a.png")
    found = scanned(world, in_json="meta.json", dataset_repeats=4)

    assert [(folder.path, folder.repeats) for folder in found.folders] == [(world.data, 4)]
    assert found.sets[0].images_per_epoch == 4
    assert scanned(world, in_json="meta.json", dataset_repeats=-4).folders[0].repeats == 1


def test_every_picture_is_looked_at_with_its_caption(world: World) -> None:
    for name in ("b.png", "c.PNG", "d.webp", "e.heic", "f.Jpg", ".g.heic", "d.caption", "c.tags", "c.txt2"):
        touch(world.folder / name)
    (folder,) = scanned(world).folders

    assert [path.name for path in folder.pictures] == ["a.png", "b.png", "c.PNG", "d.webp"]
    assert folder.without_caption == 3
    assert folder.other_captions == {".caption": 1, ".tags": 1}
    assert folder.unsupported == ("e.heic", "f.Jpg")
    assert folder.bad_captions == ()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"a cat", ""),
        # A character that is cut off where reading stops is whole in the file.
        (b"x" * 999_999 + "ü".encode(), ""),
        (b"x" * 999_997 + "🙂".encode(), ""),
        (b"x" * 999_996 + b"\xff" + b"x" * 20, "is not UTF-8"),
    ],
)
def test_captions_that_end_the_training_are_named(data: bytes, problem: str, world: World) -> None:
    caption = touch(world.folder / "a.txt", data)
    (folder,) = scanned(world).folders

    assert folder.bad_captions == ((f"{caption} {problem}",) if problem else ())


def test_a_caption_that_cannot_be_opened_is_named(world: World) -> None:
    (world.folder / "a.txt").unlink()
    (world.folder / "a.txt").mkdir()
    (folder,) = scanned(world).folders

    assert folder.bad_captions == (f"{world.folder / 'a.txt'} cannot be read (Is a directory)",)


def test_a_dataset_configuration_names_folders_that_exist_and_others(world: World) -> None:
    world.write(
        "sets.toml",
        "[[datasets]]\nresolution = 640\n[[datasets.subsets]]\nimage_dir = 'data/10_cat'\nnum_repeats = 3\n"
        "[[datasets.subsets]]\nimage_dir = 'none'\n[[datasets]]\n",
    )
    found = scanned(world, dataset_config="sets.toml", train_data_dir="")

    assert [(s.options.resolution, len(s.folders)) for s in found.sets] == [("640", 1), ("", 0)]
    assert [(folder.path, folder.repeats) for folder in found.folders] == [(world.folder, 3)]
    assert found.missing == (f"{world.root / 'none'} (image_dir)",)


def test_folders_keep_their_own_caption_endings(world: World) -> None:
    touch(world.folder / "a.cap")
    assert scanned(world, caption_extension=".cap").folders[0].other_captions == {}
    (world.folder / "a.cap").unlink()
    assert scanned(world, caption_extension=".cap").folders[0].other_captions == {".txt": 1}
