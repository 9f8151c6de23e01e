"""Types: what a trainer takes, and what it would choke on."""

from __future__ import annotations

from typing import Any

import pytest

from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options


def test_text_for_numbers_is_wrong_in_toml_and_right_on_a_command_line() -> None:
    strict, wrong = parse_options({"train_batch_size": "2", "resolution": 512}, numbers_as_text=False)
    lenient, right = parse_options({"train_batch_size": "2", "resolution": 512}, numbers_as_text=True)

    assert {w.name for w in wrong} == {"train_batch_size", "resolution"}
    assert (strict.train_batch_size, strict.resolution) == (1, "")
    assert not right
    assert (lenient.train_batch_size, lenient.resolution) == (2, "512")


@pytest.mark.parametrize(
    ("name", "value", "strict", "lenient"),
    [
        ("v2", True, True, True),
        ("v2", 1, True, True),
        ("v2", 0.0, False, False),
        ("v2", 2, None, None),
        ("v2", " Yes ", None, True),
        ("v2", "true", None, True),
        ("v2", "None", None, False),
        ("v2", "", None, False),
        ("v2", "no", None, False),
        ("v2", "false", None, False),
        ("v2", "0", None, False),
        ("v2", "1", None, True),
        ("v2", "perhaps", None, None),
        ("train_batch_size", 4, 4, 4),
        ("train_batch_size", 4.0, 4, 4),
        ("train_batch_size", 4.5, None, None),
        ("train_batch_size", True, None, None),
        ("train_batch_size", " 4 ", None, 4),
        ("train_batch_size", "4.0", None, 4),
        ("train_batch_size", "four", None, None),
        ("train_batch_size", 10**12, 10**12, 10**12),
        ("train_batch_size", 10**12 + 1, None, None),
        ("train_batch_size", -(10**13), None, None),
        ("train_batch_size", "1e400", None, None),
        ("train_batch_size", [4], None, None),
        ("learning_rate", 1, 1.0, 1.0),
        ("learning_rate", "1e-4", None, 1e-4),
        ("learning_rate", False, None, None),
        ("learning_rate", "nan", None, None),
        ("unet_lr", 0.5, 0.5, 0.5),
        ("network_dim", "8", None, 8),
        ("resolution", "512", "512", "512"),
        ("resolution", 512, None, "512"),
        ("resolution", [512], None, None),
        ("network_args", ["a=1", 2], ("a=1", "2"), ("a=1", "2")),
        ("network_args", "a=1 b=2", ("a=1", "b=2"), ("a=1", "b=2")),
        ("network_args", 5, None, None),
    ],
)
def test_values_are_taken_as_argparse_takes_them(name: str, value: Any, strict: Any, lenient: Any) -> None:
    default = getattr(TrainerOptions(), name)
    for expected, numbers_as_text in ((strict, False), (lenient, True)):
        options, wrong = parse_options({name: value}, numbers_as_text=numbers_as_text)
        found = getattr(options, name)

        assert [w.name for w in wrong] == ([name] if expected is None else [])
        assert found == (default if expected is None else expected)
        assert type(found) is type(default if expected is None else expected)


def test_a_wrong_type_says_what_was_found_and_what_is_expected() -> None:
    values = {"v2": "a", "network_dim": "b", "unet_lr": "c", "vae": 4, "network_args": 5}
    _, wrong = parse_options(values, numbers_as_text=False)

    assert {w.name: (w.found, w.expected) for w in wrong} == {
        "vae": (4, "a string in quotes"),
        "v2": ("a", "true or false"),
        "unet_lr": ("c", "a number"),
        "network_dim": ("b", "a whole number"),
        "network_args": (5, "a list of strings"),
    }


def test_unknown_names_and_null_are_passed_over() -> None:
    assert parse_options({"colour": 1, "vae": None}, numbers_as_text=False) == (TrainerOptions(), ())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (TrainerOptions(), "adamw"),
        (TrainerOptions(optimizer_type="AdaFactor"), "adafactor"),
        (TrainerOptions(use_8bit_adam=True, optimizer_type="Lion"), "adamw8bit"),
        (TrainerOptions(use_lion_optimizer=True), "lion"),
    ],
)
def test_the_optimizer_is_the_one_that_the_trainer_would_take(options: TrainerOptions, name: str) -> None:
    assert options.optimizer == name


@pytest.mark.parametrize(
    ("resolution", "sides"),
    [
        ("512", (512, 512)),
        (" 512 , 768 ", (512, 768)),
        ("512,", None),
        ("512x768", None),
        ("", None),
        ("1234567", None),
        ("512,768,1024", None),
    ],
)
def test_the_sides_of_a_resolution(resolution: str, sides: tuple[int, int] | None) -> None:
    assert TrainerOptions(resolution=resolution).width_and_height == sides


def test_network_options_are_the_pairs_of_network_args() -> None:
    options = TrainerOptions(network_args=("a=1=2", "b", "c="))

    assert options.network_options == {"a": "1=2", "c": ""}
