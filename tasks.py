"""What a person types on their machine: ``invoke --list`` shows it, ``invoke --help TASK`` explains it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.tasks import task

if TYPE_CHECKING:
    from invoke.context import Context

# The package is imported inside the tasks: listing them stays as fast as an empty file.

JSON = "print the report as JSON to standard output"
RUN = "a run, or a project or settings file, whose latest run is meant"
PRECISION = "no, fp16 or bf16, as far as the device and the profile allow"


@task(
    help={
        "json": JSON,
        "train_step": "--no-train-step leaves out the training step",
        "verify": "--no-verify leaves out the smoke check and the training step",
        "stash": "put local changes of the checkout away with git stash",
        "replace_default": "back up and replace somebody else's accelerate default configuration",
        "replace_venv": "move an environment that this project did not build aside",
        "gui": "install kohya's web page, too; it stays installed until --no-gui",
        "no_gui": "build the environment without the web page again",
    }
)
def setup(
    c: Context,
    json: bool = False,
    train_step: bool = True,
    verify: bool = True,
    stash: bool = False,
    replace_default: bool = False,
    replace_venv: bool = False,
    gui: bool = False,
    no_gui: bool = False,
) -> None:
    """Set up everything: checkout, environment, configuration, and a verified training step."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import setup

    wanted = setup.SetupOptions(verify, verify and train_step, stash, replace_default, replace_venv)
    cli.run_task(
        lambda: setup.setup(settings.load(), wanted.with_gui(gui, no_gui)),
        json=json,
        dry=c.config.run.dry,
    )


@task(
    help={
        "json": JSON,
        "repo_url": "where to clone from",
        "commit": "full commit id",
        "stash": "put local changes away",
    }
)
def clone(c: Context, json: bool = False, repo_url: str = "", commit: str = "", stash: bool = False) -> None:
    """Check out the pinned kohya_ss and its sd-scripts."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import checkout

    cli.run_task(
        lambda: checkout.clone(settings.load(url=repo_url, commit=commit), stash=stash),
        json=json,
        dry=c.config.run.dry,
    )


@task(
    help={
        "json": JSON,
        "mixed_precision": PRECISION,
        "replace_default": "back up and replace a foreign default",
        "processes": "trainings start so many processes on each machine, a GPU each; 1 goes back to one",
        "machines": "how many machines train together",
        "machine_rank": "which of them this is, from 0",
        "main_address": "the first machine, as the others reach it",
        "main_port": "a free port of the first machine",
    }
)
def configure(
    c: Context,
    json: bool = False,
    mixed_precision: str = "",
    replace_default: bool = False,
    processes: int = 0,
    machines: int = 1,
    machine_rank: int = 0,
    main_address: str = "",
    main_port: int = 29500,
) -> None:
    """Write and check the accelerate configuration of the environment."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import setup
    from kohya_mps.install.accelerate_config import ProcessLayout

    layout = ProcessLayout(processes, machines, machine_rank, main_address, main_port) if processes else None
    cli.run_task(
        lambda: setup.configure(settings.load(mixed_precision=mixed_precision), replace_default, layout),
        json=json,
        dry=c.config.run.dry,
    )


@task(help={"json": JSON, "full": "train a model of Stable Diffusion 1.5's full size"})
def verify(c: Context, json: bool = False, full: bool = False) -> None:
    """Check the installed environment and train a few steps in it."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import setup

    cli.run_task(lambda: setup.verify(settings.load(), full=full), json=json, dry=c.config.run.dry)


@task(
    help={
        "json": JSON,
        "name": "the folder to make",
        "images": "the folder with your pictures and their captions",
        "model": "the base model: a .safetensors file, a diffusers folder or a name on Hugging Face",
        "preset": "sd15-lora, sd15-locon or sdxl-lora",
    }
)
def new(
    c: Context, name: str, images: str, model: str = "", preset: str = "sd15-lora", json: bool = False
) -> None:
    """Make a project: settings for this machine, your pictures linked, sample prompts."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import new_project

    wanted = new_project.NewProjectOptions(Path(name), Path(images), model, preset)
    cli.run_task(lambda: new_project.create(settings.load(), wanted), json=json, dry=c.config.run.dry)


@task(
    help={
        "json": JSON,
        "target": "a project, or a TOML configuration as train_network.py --config_file takes it",
        "resume": "go on with the latest run of it, or with the run named",
        "detach": "return at once; the training goes on",
        "preflight": "--no-preflight trains even with what is known to fail",
    }
)
def train(
    c: Context,
    target: str,
    resume: bool = False,
    detach: bool = False,
    preflight: bool = True,
    json: bool = False,
) -> None:
    """Train with your own settings, in the pinned environment, and show how it goes."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import start

    wanted = start.TrainOptions(resume, detach, preflight)
    cli.run_task(lambda: start.train(settings.load(), Path(target), wanted), json=json, dry=c.config.run.dry)


@task(help={"target": RUN, "whole": "everything that the trainer prints"})
def logs(c: Context, target: str, whole: bool = False) -> None:
    """Show how a running training goes, or how the last one went."""
    from kohya_mps.core import cli
    from kohya_mps.train import follow

    cli.run_task(lambda: follow.logs(Path(target), whole=whole), dry=c.config.run.dry)


@task(help={"json": JSON, "target": RUN})
def stop(c: Context, target: str, json: bool = False) -> None:
    """Have a running training save its state and end."""
    from kohya_mps.core import cli
    from kohya_mps.train import follow

    cli.run_task(lambda: follow.stop(Path(target)), json=json, dry=c.config.run.dry)


@task(help={"json": JSON, "target": RUN})
def report(c: Context, target: str, json: bool = False) -> None:
    """Write a run's report: one HTML file with curves, samples, settings and versions."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import html_report

    cli.run_task(lambda: html_report.report(settings.load(), Path(target)), json=json, dry=c.config.run.dry)


@task(name="test-lora", help={"json": JSON, "target": RUN})
def test_lora(c: Context, target: str, json: bool = False) -> None:
    """Draw a picture with and without a run's LoRA, with diffusers on the device."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import compare_lora

    cli.run_task(lambda: compare_lora.test(settings.load(), Path(target)), json=json, dry=c.config.run.dry)


@task(help={"target": RUN, "port": "where it listens"})
def tensorboard(c: Context, target: str, port: int = 6006) -> None:
    """Show the runs of a project, or one run, in TensorBoard."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import tensorboard

    cli.run_task(lambda: tensorboard.serve(settings.load(), Path(target), port), dry=c.config.run.dry)


@task(
    help={
        "file": "a trainer's TOML, a JSON saved by the GUI, or a training command in a file",
        "device": "check for mps, cuda or cpu instead of this machine's device",
        "memory": "gigabytes of the machine that it is for, when that is another one",
        "trainer": "the script that a TOML is for, such as sdxl_train_network.py",
        "fix": "write a corrected copy to this file",
        "json": JSON,
    }
)
def preflight(
    c: Context,
    file: str,
    device: str = "",
    memory: str = "",
    trainer: str = "",
    fix: str = "",
    json: bool = False,
) -> None:
    """Tell what is known to go wrong with a training, before it is started."""
    from kohya_mps.core import cli, settings
    from kohya_mps.diagnose import preflight

    cli.run_task(
        lambda: preflight.check(settings.load(), preflight.parse_flags(file, device, memory, trainer, fix)),
        json=json,
        dry=c.config.run.dry,
    )


@task(
    help={
        "json": JSON,
        "deep": "start torch as a training would, too",
        "online": "ask the repository and the package index, too",
    }
)
def doctor(c: Context, json: bool = False, deep: bool = False, online: bool = False) -> None:
    """Look for known troubles of the machine and the installation."""
    from kohya_mps.core import cli, settings
    from kohya_mps.diagnose import doctor

    cli.run_task(
        lambda: doctor.examine(settings.load(), doctor.DoctorOptions(deep, online)),
        json=json,
        dry=c.config.run.dry,
    )


def _has_words(name: str) -> bool:
    """Whether a task was typed with a word behind it that is no flag.

    invoke knows no argument that is positional and can be left out: with a default it
    takes no word, without one it wants a word. So the default depends on what was typed.
    """
    typed = sys.argv[sys.argv.index(name) + 1 :] if name in sys.argv else []
    return any(word == "-" or not word.startswith("-") for word in typed)


@task(
    positional=["log"],
    help={"log": "a log or traceback; standard input when left out", "json": JSON},
)
def explain(c: Context, log: str | None = None if _has_words("explain") else "-", json: bool = False) -> None:
    """Find known failures in a log or traceback and tell what mends them."""
    from kohya_mps.core import cli
    from kohya_mps.known_failures import log_search

    cli.run_task(lambda: log_search.explain(log or "-"), json=json, dry=c.config.run.dry)


@task(
    help={
        "port": "where it listens; 7860 (config/gui.yaml) when not given",
        "open": "open it in the browser",
        "profile": "take the environment of this profile, not the active one",
        "listen": "another address than 127.0.0.1; everybody who reaches it can use the page",
        "config": "a config.toml of yours to open the forms with",
    }
)
def gui(
    c: Context, port: str = "", open: bool = False, profile: str = "", listen: str = "", config: str = ""
) -> None:
    """Open kohya's own web page, with settings that train here."""
    from kohya_mps.core import cli, settings
    from kohya_mps.gui import serve

    wanted = serve.ServeOptions(port, listen or serve.LOOPBACK, open, profile, config)
    cli.run_task(lambda: serve.serve(settings.load(), wanted), dry=c.config.run.dry)


@task(help={"json": JSON})
def status(c: Context, json: bool = False) -> None:
    """Compare the machine with what was installed, item by item."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import status

    cli.run_task(lambda: status.status(settings.load()), json=json, dry=c.config.run.dry)


@task(help={"json": JSON, "list": "show the generations", "to": "the name of one; else the one before"})
def rollback(c: Context, json: bool = False, list: bool = False, to: str = "") -> None:
    """Go back to the previous environment, with its commit and configuration."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import rollback

    step = rollback.choices if list else lambda settings: rollback.rollback(settings, to)
    cli.run_task(lambda: step(settings.load()), json=json, dry=c.config.run.dry)


@task(
    help={
        "json": JSON,
        "yes": "do not ask",
        "delete_my_files": "remove the checkout even if it holds models, outputs or changes of yours",
    }
)
def uninstall(c: Context, json: bool = False, yes: bool = False, delete_my_files: bool = False) -> None:
    """Remove what was installed, and nothing of yours."""
    from kohya_mps.core import cli, settings
    from kohya_mps.install import uninstall

    step = uninstall.uninstall
    cli.run_task(
        lambda: step(settings.load(), yes=yes, delete_my_files=delete_my_files),
        json=json,
        dry=c.config.run.dry,
    )
