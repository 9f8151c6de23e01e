"""Preflight and the rehearsals agree: what one lets through, the other can train, and the other way round."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools.rehearsal import matrix, runner, support_page
from devtools.rehearsal.runner import Training
from devtools.rehearsal.support_page import Cell, Outcomes
from kohya_mps.core import settings
from kohya_mps.core.report import Status
from kohya_mps.diagnose import preflight
from kohya_mps.diagnose.preflight import PreflightOptions
from kohya_mps.install import training_step
from tests.support.world import World

# What preflight refuses although it trains on the simulated device, and why.
REFUSED_FOR_OTHER_REASONS = {
    (
        "latest",
        "sdxl",
        "mixed precision fp16",
    ): "SDXL's VAE overflows in half precision: numbers are not simulated",
    ("latest", "sdxl", "full fp16"): "the same",
}


def rehearsed() -> Iterator[tuple[Outcomes, Training, Cell]]:
    known = runner.trainings()
    for one in support_page.load(matrix.OUTCOMES):
        for training in (
            *matrix.combinations(known, one.family, thorough=True),
            *matrix.option_trainings(known, one.family),
        ):
            if cell := one.cell(training.name):
                yield one, training, cell


def refusals(world: World, outcomes: Outcomes, training: Training) -> list[str]:
    """What preflight refuses in the command that the rehearsal trained with."""
    prompts = world.write("prompts.txt", "a red circle --w 64 --h 64 --s 2\n")
    # Beside the base model, as the training step has it.
    model = world.root / "step"
    arguments = training_step.trainer_arguments(
        "no", model, world.root / "out", training_step.TrainingStepOptions()
    )
    arguments += ["--pretrained_model_name_or_path", str(world.model), "--train_data_dir", str(world.data)]
    arguments += ["--resolution", "128,128"]
    arguments += [part.replace("{prompts}", str(prompts)) for part in training.arguments]
    script = runner.trainings().trainers[training.family]
    file = world.write("train.sh", shlex.join(["accelerate", "launch", script, *arguments]))
    report = preflight.check(settings.load(profile=outcomes.profile), PreflightOptions(file, device="mps"))
    return [check.name for check in report.checks if check.status is Status.FAIL]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outcomes", "training", "cell"),
    [
        pytest.param(*one, id=f"{one[0].profile}-{one[0].family}-{one[1].name}")
        for one in rehearsed()
        # One network and optimizer is as another to preflight, where both train.
        if not one[2].trains or one[2] in one[0].options or one[1].name.endswith("with AdamW")
    ],
)
def test_preflight_and_the_rehearsal_agree(
    outcomes: Outcomes, training: Training, cell: Cell, tmp_path: Path
) -> None:
    world = World(tmp_path)
    world.picture(world.folder / "a.png", (128, 128))
    if training.family == "sdxl":
        world.safetensors(world.model, "sdxl")
    (world.root / "step" / "tokenizers").mkdir(parents=True)

    refused = refusals(world, outcomes, training)

    if (outcomes.profile, training.family, training.name) in REFUSED_FOR_OTHER_REASONS:
        assert refused, "the reason is no longer needed"
        assert cell.trains
    else:
        assert bool(refused) is not cell.trains, (
            f"preflight refuses {refused}; rehearsed: {cell.error or 'trains'}"
        )
