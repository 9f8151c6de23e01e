"""What people really have: TOML, the GUI's JSON and pasted commands become the trainers' settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read
from kohya_mps.trainer_config.contents import LARGEST_BYTES
from kohya_mps.trainer_config.trainer_options import parse_options


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


def test_names_of_the_gui_in_a_toml_are_pointed_out(tmp_path: Path) -> None:
    file = written(tmp_path / "a.toml", 'optimizer = "AdamW8bit"\nresolution = "512"\n')

    assert "optimizer (the trainer's name: optimizer_type)" in file.notes[0]


def test_a_dataset_configuration_is_told_from_a_training(tmp_path: Path) -> None:
    file = written(tmp_path / "d.toml", "[[datasets]]\nresolution = 512\n")

    assert file.kind is Kind.DATASET
    assert file.settings == {"dataset_config": str(tmp_path / "d.toml")}


GUI = {
    "LoRA_type": "LyCORIS/LoHa",
    "optimizer": "AdamW",
    "xformers": "sdpa",
    "max_resolution": "768,768",
    "mixed_precision": "no",
    "sdxl": True,
    "sdxl_no_half_vae": True,
    "conv_dim": 4,
    "max_train_steps": 0,
    "epoch": "3",
    "gradient_checkpointing": 1,
    "fp8_base": False,
    "vae": "",
    "train_batch_size": "2",
    "additional_parameters": '--min_snr_gamma=5 --network_train_unet_only --validation_split "0.1"',
}


def test_the_guis_json_is_what_the_gui_would_tell_the_trainer(tmp_path: Path) -> None:
    file = written(tmp_path / "g.json", json.dumps(GUI))
    training, wrong = parse_options(file.settings, numbers_as_text=file.numbers_as_text)

    assert file.kind is Kind.GUI
    assert file.trainer == "sdxl_train_network.py"
    assert not wrong
    assert (training.sdpa, training.xformers) == (True, False)
    assert training.network_module == "lycoris.kohya"
    assert training.network_options == {"algo": "loha", "conv_dim": "4"}
    assert training.resolution == "768,768"
    assert training.no_half_vae
    assert training.gradient_checkpointing
    assert training.train_batch_size == 2
    assert training.max_train_epochs == 3
    assert training.network_train_unet_only
    assert training.validation_split == 0.1


def test_what_a_json_leaves_out_has_the_guis_defaults_and_is_said(tmp_path: Path) -> None:
    file = written(tmp_path / "g.json", json.dumps({"LoRA_type": "Standard", "max_resolution": "512,512"}))

    assert file.settings["mixed_precision"] == "fp16"
    assert file.settings["xformers"] is True
    assert file.settings["optimizer_type"] == "AdamW"
    assert any("mixed_precision = fp16" in note for note in file.notes)


@pytest.mark.parametrize("old", [True, False])
def test_old_jsons_say_xformers_with_a_truth_value(old: bool, tmp_path: Path) -> None:
    file = written(tmp_path / "g.json", json.dumps({**GUI, "xformers": old}))

    assert file.settings.get("xformers", False) is old


def test_the_guis_own_config_toml_is_read_like_its_json(tmp_path: Path) -> None:
    file = written(
        tmp_path / "config.toml",
        '[model]\nsave_precision = "bf16"\n[accelerate_launch]\nmixed_precision = "bf16"\n'
        '[basic]\noptimizer = "Lion"\nmax_resolution = "512,512"\n',
    )

    assert file.kind is Kind.GUI_DEFAULTS
    assert file.settings["optimizer_type"] == "Lion"
    assert file.settings["mixed_precision"] == "bf16"


SHELL = """#!/bin/sh
# my training
export MODEL="/models/my model.safetensors"
cd /somewhere && PYTORCH_ENABLE_MPS_FALLBACK=1 accelerate launch --num_cpu_threads_per_process=2 \\
  "./sd-scripts/sdxl_train_network.py" \\
  --pretrained_model_name_or_path="$MODEL" --train_data_dir '/data/it''s' \\
  --network_module=networks.lora --network_args "conv_dim=4" "conv_alpha=1" \\
  --xformers --max_train_steps 100 --output_dir $ELSEWHERE/out  # not yet
"""


def test_a_shell_command_with_all_its_trimmings(tmp_path: Path) -> None:
    file = written(tmp_path / "train.sh", SHELL)

    assert file.kind is Kind.COMMAND
    assert file.trainer == "sdxl_train_network.py"
    assert file.settings["pretrained_model_name_or_path"] == "/models/my model.safetensors"
    assert file.settings["train_data_dir"] == "/data/its"
    assert file.settings["network_args"] == ["conv_dim=4", "conv_alpha=1"]
    assert file.settings["xformers"] is True
    assert file.settings["max_train_steps"] == "100"
    assert "output_dir" not in file.settings
    assert "output_dir" in file.notes[0]


def test_a_powershell_command_keeps_its_backslashes(tmp_path: Path) -> None:
    file = written(
        tmp_path / "train.ps1",
        '$model = "D:\\models\\a.ckpt"\n$steps = [Math]::Ceiling(10 / 3)\n'
        "accelerate launch D:\\kohya_ss\\train_network.py `\n  --pretrained_model_name_or_path=$model `\n"
        '  --train_data_dir "D:\\my data" --max_train_steps=$steps\n',
    )

    assert file.trainer == "train_network.py"
    assert file.settings["pretrained_model_name_or_path"] == "D:\\models\\a.ckpt"
    assert file.settings["train_data_dir"] == "D:\\my data"
    assert "max_train_steps" not in file.settings


def test_a_command_without_an_ending_in_its_name_is_told_by_its_content(tmp_path: Path) -> None:
    assert written(tmp_path / "note", SHELL).kind is Kind.COMMAND
    assert written(tmp_path / "options", "--sdpa --train_batch_size 2 --seed 4").kind is Kind.COMMAND


def test_the_toml_that_a_command_names_is_read_and_the_command_wins(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('mixed_precision = "fp16"\nsdpa = true\n')
    file = written(tmp_path / "t.sh", "python train_network.py --config_file c --mixed_precision no")

    assert file.settings["mixed_precision"] == "no"
    assert file.settings["sdpa"] is True


def test_of_several_trainings_the_first_is_taken_and_that_is_said(tmp_path: Path) -> None:
    file = written(tmp_path / "t.sh", "python train_network.py --seed 1\npython train_db.py --seed 2\n")

    assert file.trainer == "train_network.py"
    assert "2 training commands" in file.notes[0]


@pytest.mark.parametrize(
    ("name", "data", "said"),
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
def test_what_is_none_of_them_is_refused_with_the_reason(
    name: str, data: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)

    with pytest.raises(UsageError) as refused:
        read(tmp_path / name)

    import re

    assert re.search(said, str(refused.value))


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no such file"):
            read(path)


def test_text_for_numbers_is_wrong_in_toml_and_right_on_a_command_line() -> None:
    strict, wrong = parse_options({"train_batch_size": "2", "resolution": 512}, numbers_as_text=False)
    lenient, right = parse_options({"train_batch_size": "2", "resolution": 512}, numbers_as_text=True)

    assert {w.name for w in wrong} == {"train_batch_size", "resolution"}
    assert (strict.train_batch_size, strict.resolution) == (1, "")
    assert not right
    assert (lenient.train_batch_size, lenient.resolution) == (2, "512")
