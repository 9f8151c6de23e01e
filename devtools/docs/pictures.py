"""``nox -s pictures``: the pictures of docs/pictures/, from a real set-up and a real training.

``invoke setup`` and ``invoke train`` run in a terminal of their own, and what they print there
becomes an SVG by rich. The report of ``invoke report`` is photographed by headless Chromium.
Nothing is drawn or edited: the paths and the device are those of the machine that it runs on.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from fcntl import ioctl
from pathlib import Path

import msgspec
import tomlkit
from PIL import Image, ImageDraw
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from devtools import posargs
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import capture, uv
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import ROOT
from kohya_mps.install import generations, training_step

PICTURES = ROOT / "docs" / "pictures"
MOST_BYTES = {".svg": 100_000, ".png": 200_000}
COLUMNS = 110
STEPS = 30

# What fits the small random model, in place of the preset's values for a real one.
_SMALL = {
    "resolution": "64,64", "min_bucket_reso": 64, "max_bucket_reso": 128, "max_train_steps": STEPS,
    "save_every_n_steps": 10, "save_last_n_steps_state": 10, "sample_every_n_steps": 10,
    "lr_warmup_steps": 2, "learning_rate": 2e-3, "unet_lr": 2e-3, "text_encoder_lr": 2e-3,
}  # fmt: skip

# rich's live view erases its last frame line by line before it prints the next one.
_NEXT_FRAME = re.compile(r"\r\x1b\[2K(?:\x1b\[1A\x1b\[2K)*")
_HIDE_OR_SHOW_CURSOR = re.compile(r"\x1b\[\?25[lh]")
# A picture in a README loads nothing from elsewhere: the fonts are those of the reader's machine.
_FONTS = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
_FONTS_ELSEWHERE = re.compile(r"@font-face \{.*?\}\n", re.DOTALL)


class PicturesOptions(msgspec.Struct, frozen=True):
    """``home`` is the home directory that the pictures show, in which everything is installed."""

    home: Path


def parse_options(arguments: Sequence[str]) -> PicturesOptions:
    """What follows ``nox -s pictures --``."""
    parser = posargs.parser(
        "pictures", "Set up and train in a home directory of its own, and make the README's pictures of it."
    )
    parser.add_argument(
        "--home", required=True, type=Path, help="a new directory, such as /home/you; it is shown"
    )
    return PicturesOptions(Path(os.path.abspath(parser.parse_args(arguments).home)))


def make(options: PicturesOptions) -> Report:
    """Make all pictures.

    Raises:
        UsageError: the home has an installation already, or there is no Chromium.
        StepFailed: a command failed.
    """
    home = options.home
    if (home / "tools").exists():
        raise UsageError(f"{home} has an installation already", "choose a new directory")
    if chromium() is None:
        raise UsageError("there is no Chromium to photograph the report", "Debian: `apt install chromium`")
    home.mkdir(parents=True, exist_ok=True)
    environ = _environ(home)
    say("setting up: minutes, and gigabytes where they are not in uv's cache")
    printed = typed(["setup"], environ)
    end = printed[printed.rindex("Setup of ") :]
    project = _project(home, environ)
    frames = live_frames(typed(["train", str(project)], environ))
    typed(["report", str(project)], environ)
    (report,) = project.glob("runs/*/report.html")
    PICTURES.mkdir(exist_ok=True)
    made = (
        save_svg(PICTURES / "setup.svg", "invoke setup", end),
        save_svg(PICTURES / "training.svg", "invoke train ~/shapes", midway(frames)),
        save_png(PICTURES / "report.png", report),
    )
    return Report("Pictures", made)


def chromium() -> str | None:
    """The system's Chromium, if there is one."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _environ(home: Path) -> dict[str, str]:
    """The variables of a person with this home, who has this machine's download cache."""
    cache = capture([uv(), "cache", "dir"]).stdout.strip()
    left_out = ("KOHYA_HOME", "KOHYA_PROFILE", "HF_HOME", "XDG_CACHE_HOME", "NO_COLOR")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {
        **kept,
        "UV_CACHE_DIR": cache,
        "HOME": str(home),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
    }


def typed(arguments: list[str], environ: dict[str, str]) -> str:
    """What a command of invoke prints in a terminal.

    Raises:
        StepFailed: it did not end with 0.
    """
    reader, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "invoke", *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=terminal, stdout=terminal, stderr=terminal
    ) as child:
        os.close(terminal)
        printed = io.BytesIO()
        while piece := _read(reader):
            printed.write(piece)
    os.close(reader)
    text = printed.getvalue().decode(errors="replace").replace("\r\n", "\n")
    if child.returncode:
        raise StepFailed(f"`invoke {' '.join(arguments)}` ended with {child.returncode}", text[-2000:])
    return text


def _read(reader: int) -> bytes:
    """What a terminal has to say next; empty when everybody who could write there has ended."""
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux' way to say so
        return b""


def live_frames(printed: str) -> list[str]:
    """The frames of a live view, in order."""
    return [frame for frame in _NEXT_FRAME.split(_HIDE_OR_SHOW_CURSOR.sub("", printed)) if "╭" in frame]


def midway(frames: list[str]) -> str:
    """The last frame of a live view in which at most two thirds of the steps are made.

    Raises:
        StepFailed: no frame shows a step in time.
    """
    steps = {frame: int(found[1]) for frame in frames if (found := re.search(r"(\d+) of \d+ ", frame))}
    early = [frame for frame, step in steps.items() if step <= STEPS * 2 / 3]
    if not early:
        raise StepFailed(
            "the training was over before it could be seen", "run it again on a machine that is less busy"
        )
    return early[-1][early[-1].index("╭") : early[-1].rindex("╯") + 1]


def _project(home: Path, environ: dict[str, str]) -> Path:
    """A project with the small random model, eight pictures and settings that fit."""
    installed = Installation(home / "tools" / "kohya_ss")
    model = training_step.prepare_model(
        generations.installed(installed), installed.verification, "sd15", "small"
    )
    _draw(home / "Pictures" / "shapes")
    project = home / "shapes"
    typed(
        ["new", str(project), "--images", str(home / "Pictures" / "shapes"), "--model", str(model / "model")],
        environ,
    )
    file = project / "train.toml"
    document = tomlkit.parse(file.read_text(encoding="utf-8"))
    document.update({**_SMALL, "tokenizer_cache_dir": str(model / "tokenizers")})
    file.write_text(tomlkit.dumps(document), encoding="utf-8")
    prompts = project / "prompts.txt"
    prompts.write_text(re.sub(r"--w \d+ --h \d+ --s \d+", "--w 64 --h 64 --s 8", prompts.read_text()))
    return project


def _draw(directory: Path) -> None:
    """Eight pictures of plain shapes with their captions."""
    directory.mkdir(parents=True)
    for number in range(8):
        shape, colour = ("circle", "square")[number % 2], ("red", "green", "blue", "yellow")[number // 2]
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((14, 14, 50, 50), fill=colour)
        image.save(directory / f"{number}.png")
        (directory / f"{number}.txt").write_text(f"a {colour} {shape}\n")


def save_svg(path: Path, command: str, printed: str) -> Check:
    """Write what a command printed in a terminal, with its colours, as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(printed.rstrip()))
    console.print()  # rich cuts the last line's descenders off
    # One name for all, so that the same text gives the same file.
    svg = console.export_svg(title=f"$ {command}", theme=MONOKAI, unique_id=path.stem)
    svg = _FONTS_ELSEWHERE.sub("", svg).replace("Fira Code, monospace", _FONTS)
    path.write_text(svg, encoding="utf-8")
    return _size(path)


def save_png(path: Path, page: Path) -> Check:
    """Photograph the upper part of a page, in few colours so that it stays small."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1000, "height": 830}, device_scale_factor=1.5)
        shown.goto(page.as_uri())
        photo = shown.screenshot()
        browser.close()
    Image.open(io.BytesIO(photo)).convert("RGB").quantize(128).save(path, optimize=True)
    return _size(path)


def _size(path: Path) -> Check:
    size, most = path.stat().st_size, MOST_BYTES[path.suffix]
    return Check(
        path.name, Status.PASS if size <= most else Status.FAIL, f"{size / 1000:.0f} kB of {most / 1000:.0f}"
    )


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, make)
