"""Which files are pictures for the trainer, and which of them Pillow cannot decode."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from kohya_mps.dataset.picture_files import is_ignored_picture, is_read_by_trainer, verify
from tests.support.world import World


@pytest.mark.parametrize(
    ("name", "read", "ignored"),
    [
        ("a.png", True, False),
        ("a.PNG", True, False),
        ("a.Png", False, True),
        ("a.jpeg", True, False),
        ("a.jfif", False, True),
        ("a.HEIC", False, True),
        (".a.heic", False, False),
        (".Png", False, False),
        ("a.txt", False, False),
        ("png", False, False),
        ("a.b.webp", True, False),
        ("a.bmp", True, False),
    ],
)
def test_a_files_ending_decides_exactly(name: str, read: bool, ignored: bool) -> None:
    assert (is_read_by_trainer(name), is_ignored_picture(name)) == (read, ignored)


def test_pictures_that_cannot_be_decoded_are_named_with_the_reason(tmp_path: Path) -> None:
    good = World.picture(tmp_path / "good.png")
    jpeg = World.picture(tmp_path / "good.jpg", (400, 300))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(World.picture(tmp_path / "whole.png", (600, 400)).read_bytes()[:600])
    found = verify([good, jpeg, text, cut, tmp_path / "gone.png"])

    assert [picture.path for picture in found] == [text, cut, tmp_path / "gone.png"]
    assert found[0].reason == "cannot identify image file 'text.png'"
    assert all(picture.reason for picture in found)


def test_huge_pictures_are_no_warning_and_no_bomb_until_pillow_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = World.picture(tmp_path / "a.png", (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verify([picture]) == ()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "exceeds limit" in verify([picture])[0].reason


def test_no_pictures_are_no_problem() -> None:
    assert verify([]) == ()
