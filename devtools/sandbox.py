"""``nox -s smoke`` and ``nox -s train_step``: the steps of a set-up in an isolated installation.

It lies below ``.nox`` and can be thrown away. The user's own installation is only read.
"""

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

#: The home of the isolated installation; ``rm -rf .nox`` removes it.
SANDBOX = ROOT / ".nox" / "install"


def isolated(settings: Settings) -> Settings:
    """The same settings with the isolated installation as home."""
    return msgspec.structs.replace(settings, home=SANDBOX)


def run_smoke_check(settings: Settings) -> Report:
    """Build the isolated environment, from the same lock, and run the smoke check in it."""
    own = isolated(settings)
    with exclusive_lock(Installation(own.home)):
        return smoke_check.run(own, ready(own))


def run_training_step(settings: Settings, options: training_step.TrainingStepOptions) -> Report:
    """Run the training step in the isolated environment, with the installed checkout or one of its own.

    Args:
        settings: the installation whose checkout is used when it is there.
        options: what is trained.
    """
    options.check()
    own = isolated(settings)
    home = Installation(own.home)
    with exclusive_lock(home):
        tree = None if options.builtin else kohya_checkout(settings)
        return training_step.run(own, ready(own), tree, home.verification, options)


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
    """The environment of an isolated installation, built and active.

    Raises:
        StepFailed: it cannot be built or configured.
    """
    accelerate_config.check_precision(settings)
    generation = environment.build(settings)
    generations.activate(Installation(settings.home), generation)
    generations.prune(Installation(settings.home), settings.generations_kept)
    accelerate_config.write_own(settings, generation)
    return generation


def kohya_checkout(settings: Settings) -> Path:
    """The installed checkout; where there is none, that of the isolated installation.

    Raises:
        StepFailed: there is none, and none can be made.
    """
    installed = Installation(settings.home)
    if (commits := checkout.present(installed)) is not None:
        say(f"  using the checkout in {installed.root} at {commits.kohya_ss[:12]}")
        return installed.root
    try:
        checkout.ensure_checkout(isolated(settings))
    except KohyaError as error:
        raise StepFailed(
            f"there is no checkout in {installed.root}, and none can be made: {error.what}",
            "`nox -s train_step -- --builtin` trains without kohya's trainer; KOHYA_REPO_URL names another source",
        ) from error
    return SANDBOX
