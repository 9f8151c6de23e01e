"""Which of the formats a file has, where its paths begin, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, base_directory, read, resolve_path
from kohya_mps.trainer_config.contents import LARGEST_BYTES


def written(path: Path, text: str) -> ConfigFile:
    path.write_text(text)
    return read(path)


def test_sections_of_a_toml_are_merged_as_the_trainer_merges_them(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a.toml",
        'seed = 1\n[one]\nsdpa = true\nmixed_precision = "fp16"\n[two]\nmixed_precision = "no"\n[two.deep]\nv2 = true\n',
    )

    assert file.kind is Kind.TOML
    assert file.settings["mixed_precision"] == "no"
    assert file.settings["sdpa"] is True
    assert "v2" not in file.settings


def test_names_of_the_gui_in_a_toml_are_reported(tmp_path: Path) -> None:
    file = written(tmp_path / "a.toml", 'optimizer = "AdamW8bit"\nresolution = "512"\n')

    assert "optimizer (the trainer's name: optimizer_type)" in file.notes[0]


def test_a_dataset_configuration_is_not_a_training(tmp_path: Path) -> None:
    file = written(tmp_path / "d.toml", "[[datasets]]\nresolution = 512\n")

    assert file.kind is Kind.DATASET
    assert file.settings == {"dataset_config": str(tmp_path / "d.toml")}


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.toml", b"", "is empty"),
        ("a.toml", b"a = ", "not valid TOML"),
        ("a.toml", b'train_data_dir = "C:\\data"', "backslash"),
        ("a.toml", b"colour = 1", "contains no setting that the trainers know"),
        ("a.toml", b"x = " + b"[" * 50_000, "nested too deeply"),
        ("a.toml", b"x = " + b"9" * 5000, "not valid TOML"),
        ("a.json", b"[1, 2]", "JSON list"),
        ("a.json", b'{"a": 1}', "contains no settings of kohya_ss's GUI"),
        ("a.json", b'{"a": ' + b"[" * 50_000, "nested too deeply|not valid JSON"),
        ("a.json", b"{", "not valid JSON"),
        ("a.bin", bytes(range(256)), "not text"),
        ("a.txt", b"a\0b", "contains zero bytes"),
        ("a.txt", b"hello", "none of the three formats"),
        ("a.sh", b"ls -l", "contains no training command"),
        ("a.toml", b"#" * (LARGEST_BYTES + 1), "larger than"),
    ],
)
def test_a_file_of_no_known_format_is_refused_with_the_reason(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)

    with pytest.raises(UsageError) as refused:
        read(tmp_path / name)

    assert re.search(reason, str(refused.value))


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no such file"):
            read(path)


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.toml", "sdpa = true", Kind.TOML),
        ("a", "sdpa = true", Kind.TOML),
        ("a.toml", "# --sdpa --seed\nsdpa = true", Kind.TOML),
        ("a.TOML", "note = '--sdpa --seed'\nsdpa = true", Kind.TOML),
        ("a", "[train]\nnote = ' --sdpa'\nsdpa = true", Kind.TOML),
        ("a", "sdpa = true # --sdpa --xformers", Kind.TOML),
        ("a", ' {"xformers": "sdpa", "LoRA_type": "Standard"}', Kind.GUI),
        ("a.JSON", '{"xformers": "sdpa", "LoRA_type": "Standard"}', Kind.GUI),
        ("a", "python train_network.py --sdpa", Kind.COMMAND),
        ("a.SH", "python train_network.py", Kind.COMMAND),
        ("a.toml", '[basic]\noptimizer = "Lion"\n[model]\nmax_resolution = "5"', Kind.GUI_DEFAULTS),
        ("a.toml", "[basic]\nsdpa = true\nseed = 1", Kind.TOML),
        ("a.toml", 'max_resolution = "512"', Kind.TOML),
        ("a.toml", "datasets = 5\nsdpa = true", Kind.TOML),
    ],
)
def test_a_format_is_recognized_by_the_name_then_by_the_text(
    name: str, text: str, kind: Kind, tmp_path: Path
) -> None:
    assert written(tmp_path / name, text).kind is kind


def test_only_the_trainers_own_toml_must_have_numbers_as_numbers(tmp_path: Path) -> None:
    assert not written(tmp_path / "a.toml", "sdpa = true").numbers_as_text
    assert written(tmp_path / "a.sh", "python train_network.py").numbers_as_text


def test_paths_begin_beside_the_file_unless_they_exist_only_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, own = tmp_path / "here", tmp_path / "own"
    (here / "pictures").mkdir(parents=True)
    (own / "data").mkdir(parents=True)
    monkeypatch.chdir(here)

    def base(text: str) -> Path:
        return base_directory(written(own / "a.toml", text))

    assert base("train_data_dir = 'pictures'") == here
    assert base("train_data_dir = 'pictures'\nreg_data_dir = 'data'") == here
    assert base("train_data_dir = 'data'") == own
    assert base("train_data_dir = 'nowhere'") == own
    assert base("train_data_dir = 5\nseed = 1") == own
    (own / "pictures").mkdir()
    assert base("train_data_dir = 'pictures'") == own


def test_a_path_is_expanded_and_begins_at_the_base(tmp_path: Path) -> None:
    assert resolve_path("a/b", tmp_path) == tmp_path / "a" / "b"
    assert resolve_path("/a", tmp_path) == Path("/a")
    assert resolve_path("~/a", tmp_path) == Path.home() / "a"
    assert resolve_path("~no-such-user/a", tmp_path) == tmp_path / "~no-such-user" / "a"
