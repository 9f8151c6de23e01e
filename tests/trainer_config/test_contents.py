"""The text of a configuration file, or why it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.trainer_config.contents import LARGEST_BYTES, read_text


def test_line_ends_stay_and_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "cat.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\n")
    assert read_text(path) == "a = 1\r\nb = 2\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a = 'caf\xe9'\n", "is not text in UTF-8"),
        (b"a = 1\0\n", "contains zero bytes"),
        (b"#" * (LARGEST_BYTES + 1), "larger than 4 MB"),
    ],
)
def test_what_cannot_be_a_settings_file_is_refused_with_the_reason(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "cat.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        read_text(path)
    assert str(path) in caught.value.what


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cat.toml"
    path.write_bytes(b"#" * LARGEST_BYTES)
    assert len(read_text(path)) == LARGEST_BYTES


@pytest.mark.parametrize("name", ["missing.toml", ".", "zero\0byte.toml", "n" * 5000])
def test_a_path_that_names_no_file_is_a_usage_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_text(tmp_path / name)
