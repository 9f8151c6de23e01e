"""Values that can be read as the right type, and corrected copies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.trainer_config.autofix import autofix, coerce, save
from kohya_mps.trainer_config.config_file import ConfigFile, Kind, read
from kohya_mps.trainer_config.edits import Corrected, Edit
from kohya_mps.trainer_config.trainer_options import ValueType, WrongType

EDITS = [Edit("sdpa", True, "because")]


@pytest.mark.parametrize(
    ("found", "expected", "value"),
    [
        (512, ValueType.STRING, "512"),
        (0.5, ValueType.STRING, "0.5"),
        ([512, 768], ValueType.STRING, "512,768"),
        ({"a": 1}, ValueType.STRING, None),
        ("TRUE", ValueType.BOOLEAN, True),
        ("false", ValueType.BOOLEAN, False),
        ("yes", ValueType.BOOLEAN, None),
        ("8", ValueType.INTEGER, 8),
        ("12345678901", ValueType.INTEGER, 12345678901),
        ("123456789012", ValueType.INTEGER, None),
        ("8.5", ValueType.INTEGER, None),
        (8.5, ValueType.INTEGER, None),
        ("1e-4", ValueType.NUMBER, 1e-4),
        ("inf", ValueType.NUMBER, None),
        ("nan", ValueType.NUMBER, None),
        ("a", ValueType.NUMBER, None),
        ([1], ValueType.NUMBER, None),
        ("a", ValueType.STRINGS, None),
    ],
)
def test_a_value_becomes_the_type_that_the_trainer_takes(found: Any, expected: ValueType, value: Any) -> None:
    coerced = coerce(WrongType("x", found, expected))

    assert coerced == value
    assert type(coerced) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "corrected"),
    [
        ("a.toml", "v2 = true\n", "sdpa = true  # preflight: added, because\nv2 = true\n"),
        ("a.sh", "train_network.py\n", "# preflight: added -> --sdpa; because\ntrain_network.py --sdpa\n"),
        (
            "a.json",
            '{"xformers": "none", "sdxl": true}',
            '{"// xformers": "preflight: was \\"none\\"; because", "xformers": "sdpa", "sdxl": true}',
        ),
    ],
)
def test_every_format_is_corrected_in_its_own_way(
    name: str, text: str, corrected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    file, out = read(tmp_path / name), tmp_path / "out"
    save(file, autofix(file, EDITS), out)

    assert out.read_text() == corrected
    assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize("kind", [Kind.DATASET, Kind.GUI_DEFAULTS])
def test_files_that_other_programs_own_are_left_alone(kind: Kind) -> None:
    file = ConfigFile(Path("a.toml"), kind, "seed = 1\n", {})

    assert autofix(file, EDITS) == Corrected("seed = 1\n", (), ("sdpa",))


@pytest.mark.parametrize(
    ("kind", "text"), [(Kind.TOML, "a = ["), (Kind.GUI, '{"a": ')]
)  # fmt: skip
def test_a_copy_that_cannot_be_read_is_never_written(kind: Kind, text: str, tmp_path: Path) -> None:
    file, out = ConfigFile(Path("a"), kind, "", {}), tmp_path / "out"

    with pytest.raises(StepFailed, match="cannot be corrected automatically: a is not valid") as told:
        save(file, Corrected(text, (), ()), out)
    assert "by hand" in told.value.fix
    assert not out.exists()


def test_nothing_is_overwritten_not_even_a_dangling_link(tmp_path: Path) -> None:
    file, out = ConfigFile(Path("a"), Kind.TOML, "", {}), tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")

    for path, message in ((out, "is not overwritten"), (tmp_path / "none" / "out", "is not a directory")):
        with pytest.raises(UsageError, match=message) as told:
            save(file, Corrected("a = 1\n", (), ()), path)
        assert told.value.fix == "give --fix another name"
