"""``invoke test-lora``: does a LoRA change what its base model draws with diffusers, on the device?"""

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
from kohya_mps.install.generations import Generation, installed
from kohya_mps.trainer_config import config_file
from kohya_mps.trainer_config.config_file import read
from kohya_mps.trainer_config.trainer_options import TrainerOptions, parse_options

from . import html_report, runs
from .runs import Run

# Of 255. Rounding makes less; a LoRA that learned anything makes more.
_LEAST_DIFFERENCE = 0.1


class Prompt(msgspec.Struct, frozen=True):
    """One picture to draw: the options of a sample prompt (sd-scripts, ``line_to_prompt_dict``)."""

    prompt: str
    negative: str = ""
    width: int = 512
    height: int = 512
    steps: int = 20
    scale: float = 7.5
    seed: int = 1


class Drawn(msgspec.Struct, frozen=True):
    """The result of the probe (``result.json``).

    ``modules`` is the number of modules that the LoRA changed, ``difference`` the mean difference
    of the two pictures (of 255), ``seconds`` the time for everything.
    """

    device: str
    modules: int
    difference: float
    seconds: float


def test(settings: Settings, target: Path) -> Report:
    """Draw a picture without and with the LoRA of a run, and put both into the run's report.

    Raises:
        UsageError: the run has no LoRA.
        StepFailed: diffusers could not load the model or draw.
    """
    run = runs.find(target)
    lora = run.lora()
    if lora is None:
        raise UsageError(f"{run.path} has no LoRA yet", f"`invoke logs {run.quoted_path}` shows its progress")
    generation = installed(Installation(settings.home))
    drawn = _draw(generation, run, lora)
    html_report.report(settings, run.path)
    extra = {
        "run": str(run.path),
        "lora": str(lora),
        "report": str(run.report),
        **msgspec.structs.asdict(drawn),
    }
    checks = (
        *judge(drawn, expected_device(), run.record().model),
        Check("pictures", Status.PASS, f"{run.rendered}, and in {run.report}"),
    )
    return Report(f"LoRA of {run.path}", checks, extra)


def judge(drawn: Drawn, expected: str, model: str) -> tuple[Check, ...]:
    """Whether the pictures were drawn on the expected device, and whether the LoRA changed them."""
    return (
        Check.of(
            "device",
            drawn.device.partition(":")[0] == expected,
            f"{drawn.device}, expected {expected}",
            "`invoke verify`",
        ),
        Check.of("modules", drawn.modules > 0, f"the LoRA changes {drawn.modules} modules of {model}"),
        Check.of(
            "difference",
            drawn.difference > _LEAST_DIFFERENCE,
            f"{drawn.difference:.2f} of 255 on average, same noise, {drawn.seconds:.0f} s",
            "the LoRA has no visible effect: train longer, or with a higher rate",
        ),
    )


def _draw(generation: Generation, run: Run, lora: Path) -> Drawn:
    prompt = _prompt(run)
    training, _ = parse_options(read(run.settings).settings, numbers_as_text=False)
    request = {
        **msgspec.structs.asdict(prompt),
        "model": _model(run),
        "lora": str(lora),
        "out": str(run.rendered),
        "family": run.record().family,
        "precision": _precision(training),
    }
    say(f"drawing {prompt.prompt!r} twice")
    # A base model in one file has no tokenizers: they may have to be downloaded.
    online = {name: os.environ.get(name, "0") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    try:
        accelerate_launch.probe(
            generation, PROBES / "draw_with_lora.py", msgspec.json.encode(request).decode(), extra=online
        )
    except accelerate_launch.ProbeFailed as error:
        raise StepFailed(f"diffusers could not draw with {lora}: {error}") from error
    (run.rendered / "prompt.txt").write_text(prompt.prompt, encoding="utf-8")
    return msgspec.json.decode((run.rendered / "result.json").read_bytes(), type=Drawn)


def _model(run: Run) -> str:
    """The base model: an absolute path, or a name on Hugging Face."""
    record = run.record()
    path = config_file.resolve_path(record.model, Path(record.base))
    return str(path) if path.exists() else record.model


def _precision(training: TrainerOptions) -> str:
    return training.mixed_precision if training.mixed_precision in ("fp16", "bf16") else "no"


def _prompt(run: Run) -> Prompt:
    """The first sample prompt, or else the LoRA's name."""
    prompts = run.prompts()
    return parse(prompts[0]) if prompts else Prompt(run.record().name)


def parse(line: str) -> Prompt:
    """Read a line of a prompt file; an option that is not a number counts as left out."""
    text, *parts = line.split(" --")
    options = dict(part.split(" ", 1) for part in parts if " " in part)
    numbers = {name: value for name, value in options.items() if re.fullmatch(r"\d+(\.\d+)?", value.strip())}
    default = Prompt(text)
    return Prompt(
        prompt=text,
        negative=options.get("n", "").strip(),
        width=int(float(numbers.get("w", default.width))),
        height=int(float(numbers.get("h", default.height))),
        steps=int(float(numbers.get("s", default.steps))),
        scale=float(numbers.get("l", default.scale)),
        seed=int(float(numbers.get("d", default.seed))),
    )
