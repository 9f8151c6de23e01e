"""Commands as people paste them: read as argparse reads them, and edited in their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config import command
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read
from kohya_mps.trainer_config.edits import Change, Corrected, Edit


def written(path: Path, text: str) -> ConfigFile:
    path.write_text(text)
    return read(path)


def settings(text: str, name: str = "t.sh") -> dict[str, Any]:
    found = dict(command.read(Path(name), text).settings)
    del found["launch_cpu"]
    return found


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


def test_a_command_without_an_ending_is_recognized_by_its_content(tmp_path: Path) -> None:
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
    ("options", "expected"),
    [
        ("--seed 1", {"seed": "1"}),
        ("--seed=1", {"seed": "1"}),
        ("--seed=a=b", {"seed": "a=b"}),
        ("--seed=", {"seed": ""}),
        ("--sdpa", {"sdpa": True}),
        ("--seed 1 2", {"seed": "1"}),
        ("--seed=1 2", {"seed": "1"}),
        ("--seed 1 --seed 2", {"seed": "2"}),
        ("--network_args", {"network_args": []}),
        ("--network_args a b --sdpa", {"network_args": ["a", "b"], "sdpa": True}),
        ("--network_args=a b", {"network_args": ["a", "b"]}),
        ("--optimizer_args a", {"optimizer_args": ["a"]}),
        ("stray words", {}),
    ],
)
def test_options_are_read_as_argparse_reads_them(options: str, expected: dict[str, Any]) -> None:
    assert settings(f"python train_network.py {options}") == expected


@pytest.mark.parametrize(("name", "path"), [("t.ps1", ".\\out"), ("t.BAT", ".\\out"), ("t.sh", ".out")])
def test_a_scripts_ending_says_what_a_backslash_is(name: str, path: str) -> None:
    assert settings("python train_network.py --output_dir .\\out", name) == {"output_dir": path}


@pytest.mark.parametrize("named", ["c", "c.toml"])
def test_the_ending_of_the_toml_may_be_left_out(named: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 7\n")
    text = f"python train_network.py --config_file {named} --sdpa"

    assert settings(text, str(tmp_path / "t.sh")) == {"seed": 7, "sdpa": True}


@pytest.mark.parametrize(
    ("text", "on_cpu"),
    [
        ("accelerate launch --cpu train_network.py", True),
        ("accelerate launch --use_cpu train_network.py", True),
        ("accelerate launch --num_processes 1 train_network.py --cpu", False),
    ],
)
def test_the_launchers_options_are_not_the_trainers(text: str, on_cpu: bool) -> None:
    assert command.read(Path("t.sh"), text).settings["launch_cpu"] is on_cpu


@pytest.mark.parametrize(
    ("text", "trainer"),
    [
        ("python fine_tune.py --sdpa", "fine_tune.py"),
        ("python my_train.py train_network.py --sdpa", "train_network.py"),
        ("python C:\\kohya_ss\\sdxl_train.py --sdpa", "sdxl_train.py"),
        ("--sdpa --seed 4 --v2", ""),
    ],
)
def test_the_script_is_the_last_one_that_trains(text: str, trainer: str) -> None:
    assert command.read(Path("t"), text).trainer == trainer


def test_a_single_known_option_is_no_training() -> None:
    with pytest.raises(UsageError, match="contains no training command"):
        command.read(Path("t"), "--sdpa --colour 4")


# ---- Edits --------------------------------------------------------------------------------------


def edit(text: str, name: str = "t.sh", **values: Any) -> Corrected:
    edits = [Edit(setting, value, "because") for setting, value in values.items()]
    return command.edit(Path(name), text, edits)


def test_a_comment_above_the_command_says_what_was_changed() -> None:
    text = "#!/bin/sh\ncd x &&\n  python train_network.py --seed=1 --v2 # go\necho done\n"

    assert edit(text, seed=2).text == (
        "#!/bin/sh\ncd x &&\n# preflight: --seed=1 -> --seed 2; because\n"
        "  python train_network.py --seed 2 --v2 # go\necho done\n"
    )


@pytest.mark.parametrize(
    ("values", "after"),
    [
        ({"seed": "a b"}, "--v2 --seed 'a b' --v2 --list a b --cpu"),
        ({"list": True}, "--v2 --seed 1 --v2 --list --cpu"),
        ({"sdpa": True}, "--v2 --seed 1 --v2 --list a b --cpu --sdpa"),
        ({"sdpa": 0.5}, "--v2 --seed 1 --v2 --list a b --cpu --sdpa 0.5"),
        ({"seed": None}, "--v2  --v2 --list a b --cpu"),
        # The last of two counts; both are removed.
        ({"v2": "x"}, "--v2 --seed 1 --v2 x --list a b --cpu"),
        ({"v2": None}, " --seed 1  --list a b --cpu"),
        ({"v2": False}, " --seed 1  --list a b --cpu"),
    ],
)
def test_options_are_replaced_added_and_removed(values: dict[str, Any], after: str) -> None:
    text = "train_network.py --v2 --seed 1 --v2 --list a b --cpu"

    assert edit(text, **values).text.rpartition("\n")[2] == f"train_network.py {after}"


def test_cpu_is_removed_from_the_launcher_only() -> None:
    text = "accelerate launch --cpu --use_cpu x.py train_network.py --cpu"
    corrected = edit(text, launch_cpu=None)

    assert corrected.text.splitlines()[-1] == "accelerate launch   x.py train_network.py --cpu"
    assert corrected.changes == (Change("launch_cpu", "--use_cpu", "", "because"),)


def test_what_the_named_toml_sets_is_overridden_but_cannot_be_removed(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("xformers = true\nfp8_base = true\nv2 = false\nseed = 1\n")
    text = "python train_network.py --xformers --config_file c"
    corrected = edit(text, str(tmp_path / "t.sh"), xformers=None, fp8_base=None, v2=None, seed=2)

    assert corrected.not_fixable == ("xformers", "fp8_base")
    assert corrected.text.splitlines()[-1] == "python train_network.py  --config_file c --seed 2"


def test_the_last_of_pasted_options_may_be_removed() -> None:
    corrected = edit("--xformers --fp8_base", xformers=None)

    assert corrected.text.splitlines()[-1] == " --fp8_base"
    assert corrected.not_fixable == ()


def test_without_changes_the_text_stays_as_it_is() -> None:
    assert edit("python train_network.py --seed 1", v2=None) == Corrected(
        "python train_network.py --seed 1", (), ()
    )


@pytest.mark.parametrize(("name", "mark"), [("t.bat", "REM"), ("t.CMD", "REM"), ("t.ps1", "#"), ("t", "#")])
def test_comments_are_those_of_the_shell_with_its_line_ends(name: str, mark: str) -> None:
    text = "cd x\r\npython train_network.py --seed 1\r\n"

    assert edit(text, name, seed=2, v2=True).text == (
        f"cd x\r\n{mark} preflight: --seed 1 -> --seed 2; because\r\n{mark} preflight: added -> --v2; because\r\n"
        "python train_network.py --seed 2 --v2\r\n"
    )
    assert f"{mark} preflight: --seed 1 -> left out; because" in edit(text, name, seed=None).text


def test_the_first_of_several_trainings_is_changed() -> None:
    text = "python train_network.py --seed 1\npython train_network.py --seed 1\n"

    assert edit(text, seed=2).text.endswith("--seed 2\npython train_network.py --seed 1\n")
