"""The GUI's JSON: what the GUI would pass to a trainer, and edits that the GUI reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config import gui_json
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read
from kohya_mps.trainer_config.edits import Change, Corrected, Edit
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options


def written(path: Path, text: str) -> ConfigFile:
    path.write_text(text)
    return read(path)


def passed(**values: Any) -> TrainerOptions:
    """What the trainer gets of a JSON with these values."""
    contents = gui_json.read(Path("g.json"), {"LoRA_type": "Standard", "max_resolution": "512,512", **values})
    options, wrong = parse_options(contents.settings, numbers_as_text=True)
    assert not wrong
    return options


def script(**values: Any) -> str:
    return gui_json.read(Path("g.json"), {"max_resolution": "512", "xformers": "sdpa", **values}).trainer


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


def test_the_guis_json_is_read_as_what_the_gui_passes_to_the_trainer(tmp_path: Path) -> None:
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


def test_settings_that_a_json_leaves_out_have_the_guis_defaults_and_a_note(tmp_path: Path) -> None:
    file = written(tmp_path / "g.json", json.dumps({"LoRA_type": "Standard", "max_resolution": "512,512"}))

    assert file.settings["mixed_precision"] == "fp16"
    assert file.settings["xformers"] is True
    assert file.settings["optimizer_type"] == "AdamW"
    assert any("mixed_precision = fp16" in note for note in file.notes)


@pytest.mark.parametrize("old", [True, False])
def test_old_jsons_say_xformers_with_a_boolean(old: bool, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("values", "trainer"),
    [
        ({}, "train_db.py"),
        ({"image_folder": "/x"}, "fine_tune.py"),
        ({"create_caption": False}, "fine_tune.py"),
        ({"create_buckets": False}, "fine_tune.py"),
        ({"num_vectors_per_token": 8}, "train_textual_inversion.py"),
        ({"num_vectors_per_token": 8, "sdxl": True}, "sdxl_train_textual_inversion.py"),
        ({"sdxl": True}, "sdxl_train.py"),
        ({"sdxl_checkbox": True}, "sdxl_train.py"),
        ({"LoRA_type": "Standard"}, "train_network.py"),
        ({"LoRA_type": "Flux1", "flux1_checkbox": True}, "flux_train_network.py"),
        ({"LoRA_type": "Standard", "sd3_checkbox": True, "sdxl": False}, "sd3_train_network.py"),
    ],
)
def test_the_script_is_that_of_the_tab_and_the_family(values: dict[str, Any], trainer: str) -> None:
    assert script(**values) == trainer


@pytest.mark.parametrize(
    ("values", "module", "arguments"),
    [
        ({"LoRA_type": "Standard", "conv_dim": 4}, "networks.lora", ()),
        ({"LoRA_type": "Kohya LoCon", "conv_dim": 4, "conv_alpha": 0}, "networks.lora", ("conv_dim=4",)),
        ({"LoRA_type": "Kohya DyLoRA"}, "networks.dylora", ()),
        ({"LoRA_type": "Standard", "sd3_checkbox": True}, "networks.lora_sd3", ()),
        ({"LoRA_type": "LyCORIS/LoKr", "factor": 8}, "lycoris.kohya", ("algo=lokr", "factor=8")),
        ({"LoRA_type": ""}, "", ()),
        ({"LoRA_type": 5}, "", ()),
    ],
)
def test_the_network_is_that_of_the_guis_lora_type(
    values: dict[str, Any], module: str, arguments: tuple[str, ...]
) -> None:
    options = passed(**values)

    assert (options.network_module, options.network_args) == (module, arguments)


def test_what_is_empty_false_or_zero_is_not_passed_on() -> None:
    contents = gui_json.read(
        Path("g.json"), {"LoRA_type": "Standard", "v2": False, "vae": "", "network_dim": 0, "seed": 5}
    )

    assert not {"v2", "vae", "network_dim", "seed"} & contents.settings.keys()
    assert contents.settings["max_data_loader_n_workers"] == 0


@pytest.mark.parametrize(
    ("values", "epochs"),
    [
        ({"max_train_steps": 0, "epoch": 7}, 7),
        ({"max_train_steps": "0", "epoch": "7"}, "7"),
        ({"max_train_steps": "lots", "epoch": 7}, 7),
        ({"max_train_steps": 0}, 1),
        ({"max_train_steps": 10, "epoch": 7}, None),
        ({"epoch": 7}, None),
        ({"max_train_steps": 0, "max_train_epochs": 2, "epoch": 7}, 2),
        ({"max_train_steps": 0, "dataset_config": "d.toml", "epoch": 7}, None),
    ],
)
def test_without_steps_the_guis_epochs_count(values: dict[str, Any], epochs: int | str | None) -> None:
    contents = gui_json.read(Path("g.json"), {"LoRA_type": "Standard", "xformers": "sdpa", **values})

    assert contents.settings.get("max_train_epochs") == epochs


def test_the_8_bit_switch_of_old_jsons_chooses_the_optimizer_that_is_not_named() -> None:
    assert passed(use_8bit_adam=True).optimizer == "adamw8bit"
    assert passed(use_8bit_adam=True, optimizer="Lion").optimizer == "lion"
    assert passed().optimizer == "adamw"


def test_half_precision_of_the_vae_is_sdxls_choice_alone() -> None:
    assert passed(sdxl_no_half_vae=True, sdxl=True).no_half_vae
    assert passed(sdxl_no_half_vae=True, sdxl_checkbox=True).no_half_vae
    assert not passed(sdxl_no_half_vae=True).no_half_vae


def test_one_of_three_switches_of_one_meaning_is_enough() -> None:
    flags = {"sdxl_cache_text_encoder_outputs": False, "flux1_cache_text_encoder_outputs": True}

    assert passed(**flags, sd3_cache_text_encoder_outputs=False).cache_text_encoder_outputs


@pytest.mark.parametrize("values", [{}, {"xformers": "sdpa"}, {"LoRA_type": "Standard", "colour": 1}])
def test_a_json_with_fewer_than_two_known_names_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="contains no settings of kohya_ss's GUI"):
        gui_json.read(Path("g.json"), values)


# ---- Edits --------------------------------------------------------------------------------------


def edit(text: str, **values: Any) -> Corrected:
    return gui_json.edit(text, [Edit(name, value, "because") for name, value in values.items()])


def test_the_line_before_a_changed_one_explains_it() -> None:
    text = '{\r\n\t"vae": "x",\r\n\t"optimizer" : "AdamW8bit"\r\n}'
    corrected = edit(text, optimizer_type="AdamW")

    assert corrected.text == (
        '{\r\n\t"vae": "x",\r\n\t"// optimizer": "preflight: was \\"AdamW8bit\\"; because",\n'
        '\t"optimizer" : "AdamW"\r\n}'
    )
    assert corrected.changes == (Change("optimizer", '"AdamW8bit"', '"AdamW"', "because"),)


def test_a_json_in_one_line_stays_in_one_line() -> None:
    assert edit('{"a": 1, "vae": "x"}', vae="ü").text == (
        '{"a": 1, "// vae": "preflight: was \\"x\\"; because", "vae": "ü"}'
    )


def test_an_added_member_comes_first() -> None:
    assert edit('{"a": 1}', max_train_steps=5) == Corrected(
        '{\n  "// max_train_steps": "preflight: added; because",\n  "max_train_steps": 5,"a": 1}',
        (Change("max_train_steps", "", "5", "because"),),
        (),
    )


@pytest.mark.parametrize(
    ("members", "values", "after"),
    [
        ({"mixed_precision": "fp16"}, {"mixed_precision": "no"}, {"mixed_precision": "no"}),
        ({"max_resolution": "512"}, {"resolution": "768"}, {"max_resolution": "768"}),
        ({"a": 1}, {"optimizer_type": "AdamW"}, {"a": 1, "optimizer": "AdamW"}),
        ({"xformers": "xformers"}, {"xformers": None, "sdpa": True}, {"xformers": "sdpa"}),
        ({"LoRA_type": "Flux1"}, {"network_module": "networks.lora"}, {"LoRA_type": "Standard"}),
        ({"fp8_base": True}, {"fp8_base": None}, {"fp8_base": False}),
        ({"blocks_to_swap": 3}, {"blocks_to_swap": None}, {"blocks_to_swap": 0}),
        ({"validation_split": 0.1}, {"validation_split": None}, {"validation_split": 0}),
        ({"max_data_loader_n_workers": 8}, {"max_data_loader_n_workers": 0}, {"max_data_loader_n_workers": 0}),
        ({"image_folder": "/x"}, {"train_data_dir": "/y"}, {"image_folder": "/y"}),
        ({"train_data_dir": "/x"}, {"train_data_dir": "/y"}, {"train_data_dir": "/y"}),
        (
            {"sdxl_cache_text_encoder_outputs": True, "sd3_cache_text_encoder_outputs": True},
            {"cache_text_encoder_outputs": None},
            {"sdxl_cache_text_encoder_outputs": False, "sd3_cache_text_encoder_outputs": False},
        ),
        # What the GUI does not have, or what is so already, stays.
        ({"a": 1}, {"use_8bit_adam": None, "launch_cpu": None, "fp8_base": None}, {"a": 1}),
        ({"fp8_base": False}, {"fp8_base": None}, {"fp8_base": False}),
    ],
)  # fmt: skip
def test_edits_go_to_the_guis_names_and_values(
    members: dict[str, Any], values: dict[str, Any], after: dict[str, Any]
) -> None:
    new = json.loads(edit(json.dumps(members), **values).text)
    kept = {name: value for name, value in new.items() if not name.startswith("//")}

    # As text, because 0 and false are equal.
    assert json.dumps(kept, sort_keys=True) == json.dumps(after, sort_keys=True)


def test_what_additional_parameters_set_again_cannot_be_changed_here() -> None:
    text = json.dumps({"xformers": "xformers", "additional_parameters": "--seed 4 --xformers"})
    corrected = edit(text, xformers=None, sdpa=True)

    assert corrected.not_fixable == ("xformers",)
    assert [change.now for change in corrected.changes] == ['"sdpa"']
