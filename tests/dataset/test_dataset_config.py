"""A dataset configuration: its layers, its names, and what it may leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.dataset.dataset_config import FolderSettings, SetSettings, read
from kohya_mps.trainer_config.trainer_options import TrainerOptions

OPTIONS = TrainerOptions(resolution="512", train_batch_size=4, caption_extension=".cap", sdpa=True)


def configured(tmp_path: Path, data: Any) -> tuple[SetSettings, ...]:
    path = tmp_path / "sets.json"
    path.write_text(json.dumps(data))
    return read(path, OPTIONS, tmp_path)


def folder(tmp_path: Path, **layers: Any) -> FolderSettings:
    data = {"general": layers.get("general", {}), "datasets": [layers.get("table", {})]}
    data["datasets"][0]["subsets"] = [layers.get("subset", {})]
    ((one,),) = [found.folders for found in configured(tmp_path, data)]
    return one


def test_each_set_overrides_the_options_of_the_training(tmp_path: Path) -> None:
    general = {"batch_size": 2, "enable_bucket": True}
    data = {"general": general, "datasets": [{"resolution": 768}, {"batch_size": 3, "sdpa": False}]}
    first, second = (found.options for found in configured(tmp_path, data))

    assert (first.resolution, first.train_batch_size, first.enable_bucket, first.sdpa) == (
        "768",
        2,
        True,
        True,
    )
    assert (second.resolution, second.train_batch_size, second.sdpa) == ("512", 3, False)


@pytest.mark.parametrize(
    ("resolution", "expected"), [(640, "640"), ([640, 512], "640,512"), ("640,512", "640,512")]
)
def test_a_resolution_may_be_a_number_a_list_or_a_string(
    resolution: Any, expected: str, tmp_path: Path
) -> None:
    (found,) = configured(tmp_path, {"datasets": [{"resolution": resolution}]})

    assert found.options.resolution == expected


def test_a_folder_without_settings_has_the_trainings(tmp_path: Path) -> None:
    assert folder(tmp_path, subset={"image_dir": "x"}) == FolderSettings(tmp_path / "x", 1, ".cap", False)


def test_the_innermost_layer_wins(tmp_path: Path) -> None:
    layers = {
        "general": {"num_repeats": 2, "caption_extension": ".a", "image_dir": "general"},
        "table": {"num_repeats": 3, "caption_extension": ".b"},
        "subset": {"num_repeats": 4, "is_reg": True},
    }

    assert folder(tmp_path, **layers) == FolderSettings(tmp_path / "general", 4, ".b", True)


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [(1, 1), (7, 7), (0, 1), (-3, 1), ("7", 1), (2.5, 1), (999_999, 999_999), (1_000_000, 1)],
)
def test_repeats_that_make_no_sense_count_once(repeats: Any, expected: int, tmp_path: Path) -> None:
    assert folder(tmp_path, subset={"num_repeats": repeats}).repeats == expected


def test_only_true_makes_regularization_pictures(tmp_path: Path) -> None:
    assert not folder(tmp_path, subset={"is_reg": "true"}).regularization


@pytest.mark.parametrize(
    "data", [{}, {"datasets": 5}, {"datasets": [1, "a"]}, {"general": [], "datasets": []}]
)
def test_what_is_no_table_is_passed_over(data: Any, tmp_path: Path) -> None:
    assert configured(tmp_path, data) == ()


def test_the_toml_is_read_as_the_json(tmp_path: Path) -> None:
    path = tmp_path / "sets.TOML"
    path.write_text('[[datasets]]\nresolution = 640\n[[datasets.subsets]]\nimage_dir = "/y"\n')

    assert read(path, OPTIONS, tmp_path) == configured(
        tmp_path, {"datasets": [{"resolution": 640, "subsets": [{"image_dir": "/y"}]}]}
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[", "neither TOML nor JSON"), ("[]", "contains no datasets"), ("[" * 9000, "neither TOML nor JSON")],
)  # fmt: skip
def test_what_is_no_configuration_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "sets.json").write_text(text)

    with pytest.raises(UsageError, match=reason):
        read(tmp_path / "sets.json", OPTIONS, tmp_path)
