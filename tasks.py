"""The commands of a user: ``invoke --list`` shows them, ``invoke --help TASK`` explains one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invoke.tasks import Task, task

if TYPE_CHECKING:
    from invoke.context import Context

    from kohya_mps.core.report import Report

# The package is imported inside the tasks: listing them stays as fast as with an empty file.

JSON = "print the report as JSON to standard output"
TARGET = "a run, a project, or a settings file; of the last two, their latest run"
PRECISION = "no, fp16 or bf16, as far as the device and the profile allow"


def command(**help: str) -> Callable[[Callable[..., Report | int]], Task[Callable[..., None]]]:
    """Make a task of a function that returns a report or an exit code.

    Args:
        help: what each parameter means; the text for ``json`` is added.
    """

    def decorate(step: Callable[..., Report | int]) -> Task[Callable[..., None]]:
        @functools.wraps(step)
        def run(c: Context, **arguments: Any) -> None:
            from kohya_mps.core import cli

            json = arguments.get("json", False)
            cli.run_task(lambda: step(c, **arguments), json=json, dry=c.config.run.dry)

        json = {"json": JSON} if "json" in inspect.signature(step).parameters else {}
        made: Task[Callable[..., None]] = task(help=help | json)(run)
        return made

    return decorate


@command(
    profile="the profile to install; the installed one when left out",
    train_step="--no-train-step leaves out the training step",
    verify="--no-verify leaves out the smoke check and the training step",
    stash="put local changes of the checkout away with git stash",
    replace_default="back up and replace another program's accelerate default configuration",
    replace_venv="move an environment that this project did not build aside",
    gui="install kohya's web page, too; it stays installed until --no-gui",
    no_gui="build the environment without the web page again",
)
def setup(
    c: Context,
    profile: str = "",
    json: bool = False,
    train_step: bool = True,
    verify: bool = True,
    stash: bool = False,
    replace_default: bool = False,
    replace_venv: bool = False,
    gui: bool = False,
    no_gui: bool = False,
) -> Report:
    """Set up everything: checkout, environment, configuration, and a verified training step."""
    from kohya_mps.core import settings
    from kohya_mps.install import setup

    options = setup.SetupOptions(verify, verify and train_step, stash, replace_default, replace_venv)
    return setup.setup(settings.load(profile=profile), options.with_gui(gui, no_gui))


@command(
    repo_url="where to clone from",
    commit="full commit id",
    stash="put local changes away with git stash",
)
def clone(
    c: Context, json: bool = False, repo_url: str = "", commit: str = "", stash: bool = False
) -> Report:
    """Check out the pinned kohya_ss and its sd-scripts."""
    from kohya_mps.core import settings
    from kohya_mps.install import checkout

    return checkout.clone(settings.load(url=repo_url, commit=commit), stash=stash)


@command(
    mixed_precision=PRECISION,
    replace_default="back up and replace another program's default configuration",
    processes="how many processes, with a GPU each, a training starts on each machine; 1 goes back to one",
    machines="how many machines train together",
    machine_rank="the number of this machine among them, from 0",
    main_address="the address at which the other machines reach the first",
    main_port="a free port of the first machine",
)
def configure(
    c: Context,
    json: bool = False,
    mixed_precision: str = "",
    replace_default: bool = False,
    processes: str = "",
    machines: str = "1",
    machine_rank: str = "0",
    main_address: str = "",
    main_port: str = "29500",
) -> Report:
    """Write and check the accelerate configuration of the environment."""
    from kohya_mps.core import settings
    from kohya_mps.core.cli import parse_int
    from kohya_mps.install import setup
    from kohya_mps.install.accelerate_config import ProcessLayout

    layout = (
        ProcessLayout(
            parse_int("--processes", processes),
            parse_int("--machines", machines),
            parse_int("--machine-rank", machine_rank),
            main_address,
            parse_int("--main-port", main_port),
        )
        if processes
        else None
    )
    return setup.configure(settings.load(mixed_precision=mixed_precision), replace_default, layout)


@command(full="train a model of Stable Diffusion 1.5's full size")
def verify(c: Context, json: bool = False, full: bool = False) -> Report:
    """Check the installed environment and train a few steps in it."""
    from kohya_mps.core import settings
    from kohya_mps.install import setup

    return setup.verify(settings.load(), full=full)


@command(
    name="the folder to make",
    images="the folder with your pictures and their captions",
    model="the base model: a .safetensors file, a diffusers folder or a name on Hugging Face",
    preset="sd15-lora, sd15-locon or sdxl-lora",
)
def new(
    c: Context, name: str, images: str, model: str = "", preset: str = "sd15-lora", json: bool = False
) -> Report:
    """Make a project: settings for this machine, your pictures linked, sample prompts."""
    from kohya_mps.core import settings
    from kohya_mps.train import new_project

    options = new_project.NewProjectOptions(Path(name), Path(images), model, preset)
    return new_project.create(settings.load(), options)


@command(
    target="a project, or a TOML configuration as train_network.py --config_file takes it",
    resume="continue its latest run; when TARGET is a run, that one",
    detach="return at once; the training goes on",
    preflight="--no-preflight trains even with settings that are known to fail",
)
def train(
    c: Context,
    target: str,
    resume: bool = False,
    detach: bool = False,
    preflight: bool = True,
    json: bool = False,
) -> Report | int:
    """Train with your own settings, in the pinned environment, and show how it goes."""
    from kohya_mps.core import settings
    from kohya_mps.train import start

    return start.train(settings.load(), Path(target), start.TrainOptions(resume, detach, preflight))


@command(target=TARGET, whole="print everything that the trainer printed")
def logs(c: Context, target: str, whole: bool = False) -> Report:
    """Show how a running training goes, or how the last one went."""
    from kohya_mps.train import follow

    return follow.logs(Path(target), whole=whole)


@command(target=TARGET)
def stop(c: Context, target: str, json: bool = False) -> Report:
    """End a running training after it has saved its state."""
    from kohya_mps.train import follow

    return follow.stop(Path(target))


@command(target=TARGET)
def report(c: Context, target: str, json: bool = False) -> Report:
    """Write a run's report: one HTML file with curves, samples, settings and versions."""
    from kohya_mps.core import settings
    from kohya_mps.train import html_report

    return html_report.report(settings.load(), Path(target))


@command(target=TARGET)
def test_lora(c: Context, target: str, json: bool = False) -> Report:
    """Draw a picture with and without a run's LoRA, with diffusers on the device."""
    from kohya_mps.core import settings
    from kohya_mps.train import compare_lora

    return compare_lora.test(settings.load(), Path(target))


@command(target="a project, for all its runs, or one run", port="where it listens")
def tensorboard(c: Context, target: str, port: str = "6006") -> int:
    """Show the runs of a project, or one run, in TensorBoard."""
    from kohya_mps.core import cli, settings
    from kohya_mps.train import tensorboard

    return tensorboard.serve(settings.load(), Path(target), cli.parse_int("--port", port))


@command(
    file="a trainer's TOML, a JSON saved by the GUI, or a training command in a file",
    device="check for mps, cuda or cpu instead of this machine's device",
    memory="gigabytes of memory of the machine to check for; this machine's when left out",
    trainer="the script that a TOML is for, such as sdxl_train_network.py",
    fix="write a corrected copy to this file",
)
def preflight(
    c: Context,
    file: str,
    device: str = "",
    memory: str = "",
    trainer: str = "",
    fix: str = "",
    json: bool = False,
) -> Report:
    """Find what is known to go wrong with a training, before it is started."""
    from kohya_mps.core import settings
    from kohya_mps.diagnose import preflight

    return preflight.check(settings.load(), preflight.parse_flags(file, device, memory, trainer, fix))


@command(
    deep="also start torch as a training would",
    online="also ask the repository and the package index",
)
def doctor(c: Context, json: bool = False, deep: bool = False, online: bool = False) -> Report:
    """Look for known problems of the machine and the installation."""
    from kohya_mps.core import settings
    from kohya_mps.diagnose import doctor

    return doctor.examine(settings.load(), doctor.DoctorOptions(deep, online))


@command(log="a file with a log or traceback; - reads standard input")
def explain(c: Context, log: str, json: bool = False) -> Report:
    """Find known failures in a log or traceback, and what mends them."""
    from kohya_mps.known_failures import log_search

    return log_search.explain(log)


@command(
    port="where it listens; the port of config/gui.yaml when left out",
    open="open it in the browser",
    profile="use the environment of this profile instead of the active one",
    listen="an address other than 127.0.0.1; everybody who can reach it can use the page",
    config="a config.toml of yours with the values that the forms open with",
)
def gui(
    c: Context, port: str = "", open: bool = False, profile: str = "", listen: str = "", config: str = ""
) -> int:
    """Open kohya's own web page, with settings that train here."""
    from kohya_mps.core import settings
    from kohya_mps.gui import address, serve

    options = serve.ServeOptions(port, listen or address.LOOPBACK, open, profile, config)
    return serve.serve(settings.load(), options)


@command()
def status(c: Context, json: bool = False) -> Report:
    """Compare the machine with what was installed, item by item."""
    from kohya_mps.core import settings
    from kohya_mps.install import status

    return status.status(settings.load())


@command(list="show the generations", to="the name of a generation; the previous one when left out")
def rollback(c: Context, json: bool = False, list: bool = False, to: str = "") -> Report:
    """Go back to the previous environment, with its commit and configuration."""
    from kohya_mps.core import settings
    from kohya_mps.install import rollback

    return rollback.choices(settings.load()) if list else rollback.rollback(settings.load(), to)


@command(
    yes="do not ask",
    delete_my_files="remove the checkout even if it holds models, outputs or changes of yours",
)
def uninstall(c: Context, json: bool = False, yes: bool = False, delete_my_files: bool = False) -> Report:
    """Remove what was installed, and nothing of yours."""
    from kohya_mps.core import settings
    from kohya_mps.install import uninstall

    return uninstall.uninstall(settings.load(), yes=yes, delete_my_files=delete_my_files)
