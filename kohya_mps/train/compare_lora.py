"""``invoke test-lora``: does a finished LoRA change what its base model draws, in diffusers, on the device?"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.install import accelerate_launch
from kohya_mps.install.setup import installed
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import read
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options

from . import html_report, runs
from .runs import Run

# Of 255. Less is what rounding does; a LoRA that learned anything does more.
_LEAST_DIFFERENCE = 0.1


class Prompt(msgspec.Struct, frozen=True):
    """What to draw: the options of a sample prompt (sd-scripts, ``line_to_prompt_dict``)."""

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    scale: float = 7.5
    seed: int = 1


class Drawn(msgspec.Struct, frozen=True):
    """What the probe found.

    The device, how many modules the LoRA changed, the mean difference of the two pictures
    (of 255), and the seconds that all of it took.
    """

    device: str
    modules: int
    difference: float
    seconds: float


def test(settings: Settings, place: Path) -> Report:
    """Draw a picture without and with the LoRA of a run, put both into its report.

    Raises:
        UsageError: the run has no LoRA.
        StepFailed: diffusers could not load or draw.
    """
    run = runs.find(place)
    record, lora = run.record(), run.lora()
    if lora is None:
        raise UsageError(
            f"{run.path} has no LoRA yet", f"`invoke logs {run.quoted_path}` shows how far it is"
        )
    generation = installed(Installation(settings.home))
    prompt = _prompt(run)
    training, _ = parse_options(read(run.settings).settings, numbers_as_text=False)
    orders = {
        **msgspec.structs.asdict(prompt),
        "model": _model(run),
        "lora": str(lora),
        "out": str(run.rendered),
        "family": record.family,
        "precision": _precision(training),
    }
    say(f"drawing {prompt.prompt!r} twice")
    # A base model in one file has its tokenizers on the hub.
    online = {name: os.environ.get(name, "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    try:
        accelerate_launch.probe(
            generation, PROBES / "draw_with_lora.py", msgspec.json.encode(orders).decode(), extra=online
        )
    except accelerate_launch.ProbeFailed as error:
        raise StepFailed(f"diffusers could not draw with {lora}: {error}") from error
    drawn = msgspec.json.decode((run.rendered / "result.json").read_bytes(), type=Drawn)
    (run.rendered / "prompt.txt").write_text(prompt.prompt, encoding="utf-8")
    html_report.report(settings, run.path)
    device = drawn.device.partition(":")[0]
    checks = (
        Check.of(
            "device",
            device == expected_device(),
            f"{drawn.device}, expected {expected_device()}",
            "`invoke verify`",
        ),
        Check.of("modules", drawn.modules > 0, f"the LoRA changes {drawn.modules} modules of {record.model}"),
        Check.of(
            "difference",
            drawn.difference > _LEAST_DIFFERENCE,
            f"{drawn.difference:.2f} of 255 on average, same noise, {drawn.seconds:.0f} s",
            "the LoRA changes nothing that can be seen: train longer, or with a higher rate",
        ),
        Check("pictures", Status.PASS, f"{run.rendered}, and in {run.report}"),
    )
    extra = {
        "run": str(run.path),
        "lora": str(lora),
        "report": str(run.report),
        **msgspec.structs.asdict(drawn),
    }
    return Report(f"LoRA of {run.path}", checks, extra)


def _model(run: Run) -> str:
    """The base model: a path in full, or a name on Hugging Face."""
    record = run.record()
    path = config_file.resolve_path(record.model, Path(record.base))
    return str(path) if path.exists() else record.model


def _precision(training: TrainerOptions) -> str:
    return training.mixed_precision if training.mixed_precision in ("fp16", "bf16") else "no"


def _prompt(run: Run) -> Prompt:
    """The first sample prompt, else the LoRA's name."""
    prompts = run.prompts()
    return parse(prompts[0]) if prompts else Prompt(run.record().name)


def parse(line: str) -> Prompt:
    """A line of a prompt file."""
    text, *options = line.split(" --")
    given = dict(option.split(" ", 1) for option in options if " " in option)
    numbers = {name: value for name, value in given.items() if re.fullmatch(r"\d+(\.\d+)?", value.strip())}
    plain = Prompt(text)
    return Prompt(
        prompt=text,
        negative=given.get("n", "").strip(),
        width=int(float(numbers.get("w", plain.width))),
        height=int(float(numbers.get("h", plain.height))),
        steps=int(float(numbers.get("s", plain.steps))),
        scale=float(numbers.get("l", plain.scale)),
        seed=int(float(numbers.get("d", plain.seed))),
    )
