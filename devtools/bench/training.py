"""What training costs: the training step, a step of a training, a rehearsal."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path

import msgspec

from devtools import sandbox
from devtools.rehearsal import runner
from devtools.rehearsal.record import Record
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import ProcessResult
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.install import accelerate_launch, training_step
from kohya_mps.install.generations import installed
from kohya_mps.train import runs, start

from .comparison import Comparison, medians, own_environ, run_command, tool

SETTINGS = """
pretrained_model_name_or_path = "{model}/model"
tokenizer_cache_dir = "{model}/tokenizers"
train_data_dir = "{model}/images"
caption_extension = ".txt"
resolution = "64,64"
network_module = "networks.lora"
network_dim = 4
output_name = "bench"
output_dir = "output"
optimizer_type = "AdamW"
learning_rate = 1e-4
max_train_steps = 150
seed = 42
sdpa = true
cache_latents = true
max_data_loader_n_workers = 0
"""


def train_step(settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    """Run the training step in isolation, once the environment is built."""
    isolated = sandbox.isolated(settings)
    generation = installed(Installation(isolated.home))
    checkout = Installation(settings.home).root
    model = training_step.prepare_model(generation, Installation(isolated.home).verification, "sd15", "small")
    options = training_step.TrainingStepOptions()
    ours: list[ProcessResult] = []
    bare: list[ProcessResult] = []
    for _ in range(min(times, 3) + 1):
        ours.append(run_command([tool("nox"), "-s", "train_step"], env=own_environ()))
        output = scratch / "out"
        command, cwd = training_step.trainer_command(isolated, generation, checkout, model, output, options)
        environ = accelerate_launch.environ(generation, offline=True)
        bare.append(run_command(command, env=environ, cwd=cwd))
        shutil.rmtree(output)
    # The first round warms the caches and does not count.
    seconds = tuple(statistics.median(done.seconds for done in side[1:]) for side in (ours, bare))
    memory = tuple(statistics.median(done.peak_bytes / 1e6 for done in side[1:]) for side in (ours, bare))
    against = "accelerate launch of the same command"
    return [
        Comparison("nox -s train_step, once built", against, seconds, "s", 1.2),
        Comparison("nox -s train_step, peak memory", against, memory, "MB", 1.05),
    ]


def training(settings: Settings, scratch: Path, times: int) -> list[Comparison]:
    """Train, and compare the milliseconds of a step from what both sides wrote for TensorBoard."""
    home = Installation(settings.home)
    generation = installed(home)
    model = training_step.prepare_model(generation, home.verification, "sd15", "small")
    project = scratch / "training"
    project.mkdir()
    file = project / runs.SETTINGS
    file.write_text(SETTINGS.format(model=model), encoding="utf-8")

    def milliseconds(run: runs.Run) -> float:
        script, lora = PROBES / "inspect_run.py", str(run.output / "bench.safetensors")
        printed = accelerate_launch.probe(generation, script, str(run.tensorboard), lora, "lora_up")
        shutil.rmtree(run.path)
        trained = msgspec.json.decode(printed, type=training_step.TrainedLora)
        assert trained.seconds_per_step is not None  # it made more than one step
        return trained.seconds_per_step * 1000

    def ours() -> float:
        run_command([tool("invoke"), "train", str(project)], env=own_environ())
        return milliseconds(runs.find(project))

    def bare() -> float:
        run = runs.new(file)
        shutil.copyfile(file, run.settings)
        planned = start.plan(home, file, project)
        script = [str(PROBES / "small_trainer.py"), str(planned.trainer)]
        command = accelerate_launch.argv(generation, *script, *start.trainer_arguments(planned, run))
        run_command(command, env=accelerate_launch.environ(generation), cwd=project)
        return milliseconds(run)

    measured = medians(times, ours, bare)
    return [
        Comparison("invoke train, a step", "accelerate launch of the same settings", measured, "ms", 1.03)
    ]


def rehearsal(settings: Settings, _scratch: Path, times: int) -> list[Comparison]:
    """Train on the simulated device, and on the CPU."""

    def seconds(record: Record) -> float:
        if record.error:
            raise StepFailed(f"the training on {record.device} failed: {record.error}")
        return record.seconds

    plain = runner.Training("lora with AdamW", "", ("lora", "AdamW", "20"))
    rounds: list[tuple[float, float]] = []
    with exclusive_lock(Installation(sandbox.SANDBOX)):
        stage = runner.prepare(settings, builtin=True)
        for _ in range(min(times, 3)):
            pair = runner.requests(stage, plain, stage.work / "bench", fallback=False)
            runner.run(stage, pair, jobs=1)
            rounds.append((seconds(runner.result(pair[0])), seconds(runner.result(pair[1]))))
    measured = tuple(statistics.median(column) for column in zip(*rounds, strict=True))
    return [Comparison("training on the simulated device", "the same on the CPU", measured, "s", 2.5)]
