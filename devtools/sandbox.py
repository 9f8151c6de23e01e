"""The same steps in a throw-away installation below ``.nox``: nothing of the user's is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from kohya_mps.core.errors import KohyaError, StepFailed
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Report, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.install import (
    accelerate_config,
    checkout,
    environment,
    generations,
    smoke_check,
    training_step,
)
from kohya_mps.install.generations import Generation

#: The home of the throw-away installation; ``rm -rf .nox`` removes it.
SANDBOX = ROOT / ".nox" / "install"


def run_smoke_check(settings: Settings) -> Report:
    """Build the environment in isolation, from the same lock, and run the smoke check in it."""
    apart = msgspec.structs.replace(settings, home=SANDBOX)
    with exclusive_lock(Installation(SANDBOX)):
        return smoke_check.run(apart, ready(apart))


def run_training_step(settings: Settings, options: training_step.TrainingStepOptions) -> Report:
    """Run the training step in the isolated environment, on the installed checkout or one of its own.

    Args:
        settings: the installation whose checkout is used when it is there.
        options: what is trained.
    """
    options.check()
    apart, home = msgspec.structs.replace(settings, home=SANDBOX), Installation(SANDBOX)
    with exclusive_lock(home):
        tree = None if options.builtin else kohya_checkout(settings, apart)
        return training_step.run(apart, ready(apart), tree, home.verification, options)


def parse_options(arguments: Sequence[str]) -> training_step.TrainingStepOptions:
    """The options of ``nox -s train_step``."""
    parser = posargs.parser("train_step", "Train a few steps and judge them.")
    parser.add_argument("--network", default="lora", choices=tuple(training_step.NETWORKS))
    parser.add_argument("--optimizer", default="AdamW", metavar="NAME", help="as sd-scripts names it")
    parser.add_argument("--full", action="store_true", help="a model of Stable Diffusion 1.5's size (4 GB)")
    parser.add_argument("--builtin", action="store_true", help="train without kohya's trainer")
    parsed = parser.parse_args(arguments)
    return training_step.TrainingStepOptions(parsed.network, parsed.optimizer, parsed.full, parsed.builtin)


def ready(settings: Settings) -> Generation:
    """The environment of the throw-away installation, built where it is not there yet."""
    accelerate_config.check_precision(settings)
    generation = environment.build(settings)
    generations.activate(Installation(settings.home), generation)
    generations.prune(Installation(settings.home), settings.generations_kept)
    accelerate_config.write_own(settings, generation)
    return generation


def kohya_checkout(settings: Settings, apart: Settings) -> Path:
    """The installed checkout; where there is none, one of our own."""
    installed = Installation(settings.home)
    if (commits := checkout.present(installed)) is not None:
        say(f"  using the checkout in {installed.root} at {commits.kohya_ss[:12]}")
        return installed.root
    try:
        checkout.ensure_checkout(apart)
    except KohyaError as error:
        raise StepFailed(
            f"there is no checkout in {installed.root}, and none can be had: {error.what}",
            "`nox -s train_step -- --builtin` trains without kohya's trainer; KOHYA_REPO_URL names another source",
        ) from error
    return apart.home
