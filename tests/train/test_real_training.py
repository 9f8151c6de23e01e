"""Real trainings by the real, unchanged trainer on small random models. Slow: minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devtools import sandbox
from kohya_mps.core import settings
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.install import accelerate_config, accelerate_launch, generations, setup, training_step
from kohya_mps.install.accelerate_config import ProcessLayout
from kohya_mps.install.generations import Generation
from kohya_mps.train import compare_lora, follow, new_project, runs, start
from kohya_mps.train.runs import Run, State
from kohya_mps.train.start import TrainOptions

pytestmark = [
    pytest.mark.environment,
    pytest.mark.upstream,
    pytest.mark.skipif(
        not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
        reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
    ),
]

# What the small model is trained with, in place of the presets' values for a real one.
SMALL: dict[str, Any] = {
    "resolution": "64,64",
    "min_bucket_reso": 64,
    "max_bucket_reso": 128,
    "max_train_steps": 24,
    "save_every_n_steps": 7,
    "save_last_n_steps_state": 7,
    "sample_every_n_steps": 7,
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "unet_lr": 1e-3,
    "text_encoder_lr": 1e-3,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """An installation on the disk that environments are on, so that its packages are links."""
    home = sandbox.SANDBOX.parent / f"home-of-{tmp_path_factory.getbasetemp().name}"
    shutil.rmtree(home, ignore_errors=True)
    before = dict(os.environ)
    os.environ |= {"HF_HOME": str(tmp_path_factory.mktemp("hf")), "OMP_NUM_THREADS": "1"}
    chosen = msgspec.structs.replace(settings.load(), home=home)
    report = setup.setup(chosen, setup.SetupOptions(smoke=False, train_step=False))
    assert report.ok, report.checks
    yield chosen
    os.environ.clear()
    os.environ |= before
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def generation(here: Settings) -> Generation:
    return generations.installed(Installation(here.home))


def make(
    here: Settings,
    project: Path,
    *,
    family: str = "sd15",
    preset: str = "sd15-lora",
    only: str = "*",
    **changed: Any,
) -> Path:
    """A project with the small model's pictures and settings that fit it."""
    generation = generations.installed(Installation(here.home))
    model = training_step.prepare_model(generation, Installation(here.home).verification, family, "small")
    images = project.parent / f"pictures of {project.name}" / "2_shapes"
    shutil.copytree(model / "images" / "2_shapes", images)
    for path in set(images.iterdir()) - set(images.glob(only)):
        path.unlink()
    report = new_project.create(
        here, new_project.NewProjectOptions(project, images.parent, str(model / "model"), preset)
    )
    assert report.ok, report.checks
    file = project / "train.toml"
    lines = file.read_text()
    for name, value in {**SMALL, "tokenizer_cache_dir": str(model / "tokenizers"), **changed}.items():
        line = f"{name} = {json.dumps(value)}"
        lines, there = re.subn(rf"^{name} = .*$", line, lines, flags=re.MULTILINE)
        lines += "" if there else f"{line}\n"
    file.write_text(lines)
    prompts = project / "prompts.txt"
    prompts.write_text(re.sub(r"--w \d+ --h \d+ --s \d+", "--w 64 --h 64 --s 4", prompts.read_text()))
    return project


def killed_after(here: Settings, project: Path, steps: int) -> Run:
    """A run whose trainer was killed, without a warning, when it had made so many steps."""
    started = start.train(here, project, TrainOptions(detach=True))
    run = Run(Path(started.extra["run"]))
    deadline = time.monotonic() + 300
    while len(run.steps()) < steps:
        assert run.state() is State.RUNNING, run.log.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    begun = run.begun()
    assert begun is not None
    os.kill(begun.pid, signal.SIGKILL)
    return run


@pytest.mark.parametrize(
    ("name", "made"),
    [
        # A state of the middle of an epoch, everything random on; one of an epoch's end; two
        # batches a step; an optimizer with a state of its own; SDXL.
        ("middle", {"flip_aug": True, "cache_latents": False, "network_dropout": 0.1, "train_batch_size": 2}),
        ("end", {"save_every_n_steps": 8}),
        ("two", {"gradient_accumulation_steps": 2}),
        (
            "prodigy",
            {"optimizer_type": "Prodigy", "learning_rate": 1.0, "unet_lr": 1.0, "text_encoder_lr": 1.0},
        ),
        ("sdxl", {"family": "sdxl", "preset": "sdxl-lora", "max_train_steps": 20}),
    ],
)
def test_a_killed_and_resumed_run_has_the_losses_of_one_that_was_not(
    here: Settings, tmp_path: Path, name: str, made: dict[str, Any]
) -> None:
    straight = start.train(here, make(here, tmp_path / name, **made), TrainOptions())
    assert straight.ok, straight.checks
    run = killed_after(here, make(here, tmp_path / f"{name}-killed", **made), 17)

    resumed = start.train(here, run.path, TrainOptions(resume=True))

    assert resumed.ok, resumed.checks
    expected = Run(Path(straight.extra["run"])).steps()
    found = run.steps()
    assert [(s.step, s.epoch, s.loss, s.average, s.rates) for s in found] == [
        (s.step, s.epoch, s.loss, s.average, s.rates) for s in expected
    ]


def test_the_wrapper_changes_no_loss(here: Settings, generation: Generation, tmp_path: Path) -> None:
    project = make(here, tmp_path / "cat")
    watched = start.train(here, project, TrainOptions())
    bare = runs.new(project / "train.toml")
    shutil.copyfile(project / "train.toml", bare.settings)
    planned = start.plan(Installation(here.home), project / "train.toml", project)
    scripts = [str(PROBES / "small_trainer.py"), str(planned.trainer)]
    command = accelerate_launch.argv(generation, *scripts, *start.trainer_arguments(planned, bare))
    subprocess.run(
        command, env=accelerate_launch.environ(generation), cwd=project, check=True, capture_output=True
    )

    lora = str(bare.output / "cat.safetensors")
    printed = accelerate_launch.probe(
        generation, PROBES / "inspect_run.py", str(bare.tensorboard), lora, "lora_up"
    )

    found = msgspec.json.decode(printed, type=training_step.TrainedLora)
    assert list(found.losses) == watched.extra["losses"]


def test_a_stopped_run_saves_its_state_and_goes_on(here: Settings, tmp_path: Path) -> None:
    project = make(here, tmp_path / "cat", save_every_n_steps=1000, max_train_steps=200)
    run = Run(Path(start.train(here, project, TrainOptions(detach=True)).extra["run"]))
    while len(run.steps()) < 5:
        time.sleep(0.05)

    stopped = follow.stop(project)

    assert stopped.extra["state"] is State.STOPPED
    assert runs.resumable(run).step == stopped.extra["steps"]


@pytest.mark.parametrize("preset", ["sd15-lora", "sd15-locon", "sdxl-lora"])
def test_a_trained_lora_changes_what_diffusers_draws(here: Settings, tmp_path: Path, preset: str) -> None:
    family = new_project.presets()[preset].family
    project = make(here, tmp_path / "cat", family=family, preset=preset, max_train_steps=10)
    assert start.train(here, project, TrainOptions()).ok

    report = compare_lora.test(here, project)

    assert report.ok, report.checks
    text = runs.find(project).report.read_text()
    assert "with the LoRA" in text


def test_the_curve_falls_on_two_pictures(here: Settings, tmp_path: Path) -> None:
    rates: dict[str, Any] = dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr"), 5e-3)
    project = make(
        here, tmp_path / "two", only="[01].*", max_train_steps=200, save_every_n_steps=100, **rates
    )

    report = start.train(here, project, TrainOptions())

    losses = report.extra["losses"]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved_from_it(
    here: Settings, generation: Generation, tmp_path: Path
) -> None:
    rates: dict[str, Any] = dict.fromkeys(("learning_rate", "unet_lr", "text_encoder_lr"), 1e18)
    project = make(here, tmp_path / "cat", save_every_n_steps=1, sample_every_n_steps=100, **rates)

    # Preflight would not let such a rate pass.
    report = start.train(here, project, TrainOptions(preflight=False))

    failed = {check.name: check.detail for check in report.checks if check.status is Status.FAIL}
    assert "nothing was saved from it" in failed["not finite"]
    assert runs.find(project).steps()[-1].step == len(
        list(runs.find(project).output.glob("*-step*.safetensors"))
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk needs the right to mount one")
def test_a_full_disk_damages_no_checkpoint(here: Settings, generation: Generation, tmp_path: Path) -> None:
    project = make(
        here, tmp_path / "cat", save_every_n_steps=2, save_last_n_steps_state=1000, max_train_steps=200
    )
    (project / "runs").mkdir()
    # Room for a few checkpoints, and for what the trainer's wrapper leaves free.
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", project / "runs"],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        report = start.train(here, project, TrainOptions())

        failed = {check.name: check for check in report.checks if check.status is Status.FAIL}
        assert "MB left" in failed["disk"].detail
        run = runs.find(project)
        assert not list(run.output.glob(".*"))
        for lora in run.output.glob("*.safetensors"):
            accelerate_launch.probe(
                generation, PROBES / "inspect_run.py", str(run.tensorboard), str(lora), "lora_up"
            )
        assert runs.resumable(run).step > 0
    finally:
        subprocess.run(["umount", project / "runs"], check=True)


def test_two_processes_train_together(here: Settings, generation: Generation, tmp_path: Path) -> None:
    project = make(here, tmp_path / "cat", max_train_steps=8, save_every_n_steps=4, sample_every_n_steps=4)
    accelerate_config.configure_distributed(here, generation, ProcessLayout(processes=2))
    try:
        report = start.train(here, project, TrainOptions())
    finally:
        accelerate_config.configure_distributed(here, generation, ProcessLayout())

    run = runs.find(project)
    assert report.ok, report.checks
    begun = run.begun()
    assert begun is not None
    assert begun.processes == 2
    # One for each of two prompts at two moments; one checkpoint at each, and the last.
    assert len(list(run.samples.glob("*.png"))) == 4
    assert len(list(run.output.glob("*.safetensors"))) == 3
    # The random states of both processes are in the state.
    assert len(list((run.output / "cat-step00000008-state").glob("watched_*.pt"))) == 2
    # The loss in the steps is the mean of both, TensorBoard's is that of the first process.
    printed = accelerate_launch.probe(
        generation, PROBES / "inspect_run.py", str(run.tensorboard), str(run.lora()), "lora_up"
    )
    own = msgspec.json.decode(printed, type=training_step.TrainedLora).losses
    assert any(abs(step.loss - loss) > 1e-4 for step, loss in zip(run.steps(), own, strict=True))
