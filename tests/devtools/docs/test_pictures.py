from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live
from rich.panel import Panel

from devtools.docs import pictures
from devtools.docs.pictures import PICTURES
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Status


def live_view(*steps: int) -> str:
    """What rich's live view prints for a training that is at these steps one after the other."""
    printed = io.StringIO()
    console = Console(file=printed, force_terminal=True, width=40)
    with Live(console=console, auto_refresh=False) as live:
        for step in steps:
            live.update(Panel(f"{step} of {pictures.STEPS}   on cpu\nloss"), refresh=True)
    return printed.getvalue()


def test_the_picture_of_a_training_shows_it_midway() -> None:
    frames = pictures.live_frames(f"checked\n{live_view(1, 12, 20, 21, 30)}done\n")

    shown = pictures.midway(frames)

    assert len(frames) >= 5
    assert "20 of 30" in shown
    assert shown.count("╭") == shown.count("╯") == 1


def test_a_training_that_was_too_fast_to_be_seen_is_an_error() -> None:
    with pytest.raises(StepFailed, match="before it could be seen"):
        pictures.midway(pictures.live_frames(live_view(29, 30)))


def test_what_a_terminal_got_becomes_a_picture_that_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    printed = "\x1b[32mpass\x1b[0m  ~/tools & more\n"

    check = pictures.save_svg(tmp_path / "a.svg", "invoke status", printed)

    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert check.status is Status.PASS
    assert "pass" in svg
    assert "url(" not in svg.replace("url(#", "")
    pictures.save_svg(tmp_path / "a.svg", "invoke status", printed)
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == svg


def test_a_picture_that_is_too_large_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", {".svg": 100})

    assert pictures.save_svg(tmp_path / "a.svg", "invoke status", "text").status is Status.FAIL


def test_a_home_with_an_installation_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()

    with pytest.raises(UsageError, match="has an installation already"):
        pictures.make(pictures.PicturesOptions(tmp_path))


def test_a_command_sees_a_terminal_and_its_failure_is_an_error(tmp_path: Path) -> None:
    environ = pictures._environ(tmp_path)

    assert "Available tasks" in pictures.typed(["--list"], environ)
    with pytest.raises(StepFailed, match="ended with 1"):
        pictures.typed(["no-such-task"], environ)


def test_the_pictures_that_are_committed_are_small_enough() -> None:
    found = [path for path in PICTURES.iterdir() if path.stat().st_size > pictures.MOST_BYTES[path.suffix]]

    assert found == []


@pytest.mark.environment
@pytest.mark.upstream
@pytest.mark.skipif(pictures.chromium() is None, reason="there is no Chromium here (Debian: chromium)")
@pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)
def test_the_pictures_are_made_from_a_real_set_up_and_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "PICTURES", tmp_path / "pictures")

    report = pictures.make(pictures.PicturesOptions(tmp_path / "you"))

    assert report.ok, report.checks
    made = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert set(made) == {path.name for path in PICTURES.iterdir()}
    assert b"LoRA" in made["setup.svg"]
    assert b"of&#160;30" in made["training.svg"]
    shutil.rmtree(tmp_path / "you")
