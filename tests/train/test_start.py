"""``invoke train``: what is started, what is told of it, and what can be gone on from.

A small program stands in for the trainer's interpreter: it does what the watched trainer
does to a run's files. The real trainer is in test_train_real.py.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, Stopped, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import generations, inventory
from kohya_mps.install.generations import Generation, Manifest
from kohya_mps.train import follow, runs, start
from kohya_mps.train.runs import Run, State
from kohya_mps.train.start import TrainOptions
from tests.support.world import World

STAND_IN = """#!{python}
import json, os, sys, time
from pathlib import Path
orders = next(json.loads(word) for word in sys.argv if word.startswith("{{"))
told = sys.argv
output = Path(told[told.index("--output_dir") + 1])
name = told[told.index("--output_name") + 1]
steps, begun, ended, stop = (Path(orders[n]) for n in ("steps", "begun", "ended", "stop"))
(steps.parent / "told.json").write_text(json.dumps([told, os.getcwd(), os.getsid(0) == os.getpid()]))
first = 1
if orders["resume"]:
    first += json.loads((Path(orders["resume"]) / "train_state.json").read_text())["current_step"]
begun.write_text(json.dumps({{"total": 6, "device": "cpu", "processes": 1, "pid": os.getpid()}}))
def save(step):
    state = output / f"{{name}}-step{{step:08d}}-state"
    state.mkdir()
    (state / "train_state.json").write_text(json.dumps({{"current_epoch": 1, "current_step": step}}))
    (state / "watched_0.pt").touch()
def end(how, step, error=""):
    ended.write_text(json.dumps({{"how": how, "step": step, "error": error}}))
for step in range(first, 7):
    if stop.exists():
        save(step - 1)
        end("stopped", step - 1)
        sys.exit(0)
    with steps.open("a") as file:
        file.write(json.dumps(dict(step=step, epoch=1, time=time.time(), loss=1 / step, average=1 / step,
                                   memory=1, rates={{"unet": 1e-4}})) + "\\n")
    if step == 3 and not orders["resume"]:
        save(3)
    if step == 4 and not orders["resume"]:
        {at_four}
    time.sleep(0.02)
(output / f"{{name}}.safetensors").write_bytes(b"lora")
end("finished", 6)
"""

GO_ON = "pass"
FAIL = "print(\"ValueError: fp16 mixed precision requires a GPU (not 'mps').\", flush=True); sys.exit(1)"
DIE = "os.kill(os.getpid(), 9)"
NOT_FINITE = 'end("failed", 4, "NotFinite: the loss of step 4 is nan"); sys.exit(1)'
NO_MEMORY = 'end("failed", 4, "RuntimeError: MPS backend out of memory (…)"); sys.exit(1)'
NO_DISK = 'end("failed", 4, "DiskFull: /x has 3 MB left; the checkpoint needs 9 MB more"); sys.exit(1)'
WAIT = "[time.sleep(0.05) for _ in range(400) if not stop.exists()]"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    home = Installation(tmp_path / "home")
    generation = Generation(home.generations / "one")
    generation.python.parent.mkdir(parents=True)
    generation.python.touch()
    generation.python.chmod(0o755)
    generation.complete(
        Manifest("validated", "lock", "3.11.9", "/usr/bin/python3.11", inventory.take(generation.venv), 1.0)
    )
    generation.accelerate_config.write_text("use_cpu: false\n")
    generations.activate(home, generation)
    subprocess.run(["git", "init", "--quiet", str(home.root)], check=True)
    home.sd_scripts.mkdir()
    for name in ("train_network.py", "sdxl_train_network.py"):
        (home.sd_scripts / name).write_text("")
    return msgspec.structs.replace(settings.load(), home=home.root)


def stand_in(here: Settings, at_four: str = GO_ON) -> None:
    active = generations.active(Installation(here.home))
    assert active is not None
    active.python.write_text(STAND_IN.format(python=sys.executable, at_four=at_four))
    active.python.chmod(active.python.stat().st_mode | stat.S_IXUSR)


def told(run: Run) -> tuple[list[str], str, bool]:
    words, place, leads_session = json.loads((run.path / "told.json").read_text())
    return words, place, leads_session


def fails(report: Report) -> dict[str, Check]:
    return {check.name: check for check in report.checks if check.status is Status.FAIL}


def test_a_training_keeps_everything_of_it_in_its_run(here: Settings, world: World) -> None:
    stand_in(here)

    report = start.train(here, world.toml(), TrainOptions())

    assert report.ok
    assert report.extra["state"] is State.FINISHED
    assert report.extra["losses"] == [1 / n for n in range(1, 7)]
    run = runs.find(world.root)
    words, place, leads_session = told(run)
    assert words[words.index("--output_dir") + 1] == str(run.output)
    assert words[words.index("--config_file", words.index("launch") + 3) + 1] == str(run.settings)
    assert words[1:4] == ["-P", "-m", "accelerate.commands.accelerate_cli"]
    assert place == str(world.root)
    assert leads_session
    assert run.settings.read_bytes() == world.toml().read_bytes()
    assert not list((world.root / "out").iterdir())


def test_the_base_model_decides_which_trainer_it_is(here: Settings, world: World) -> None:
    world.safetensors(world.model, "sdxl")
    stand_in(here)

    start.train(
        here, world.toml(no_half_vae=True, network_train_unet_only=True), TrainOptions(preflight=False)
    )

    words, _, _ = told(runs.find(world.root))
    assert str(Installation(here.home).sd_scripts / "sdxl_train_network.py") in words


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"network_module": None}, "network_module is not set"),
        ({"pretrained_model_name_or_path": "/nowhere/model.safetensors"}, "does not exist"),
        ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path is not set"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_no_run_made(
    here: Settings, world: World, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        start.train(here, world.toml(**changed), TrainOptions())

    assert not (world.root / "runs").exists()


def test_flux_is_refused(here: Settings, world: World) -> None:
    world.safetensors(world.model, "flux")

    with pytest.raises(UsageError, match="the base model is flux"):
        start.train(here, world.toml(), TrainOptions())


def test_without_the_trainer_it_says_what_brings_it(here: Settings, world: World) -> None:
    (Installation(here.home).sd_scripts / "train_network.py").unlink()

    with pytest.raises(UsageError, match=r"no checkout[^$]*invoke clone"):
        start.train(here, world.toml(), TrainOptions())


def test_what_is_known_to_fail_is_not_started(here: Settings, world: World) -> None:
    stand_in(here)

    with pytest.raises(StepFailed, match=r"xformers is chosen[^$]*--fix OUT[^$]*--no-preflight"):
        start.train(here, world.toml(xformers=True, sdpa=False), TrainOptions())
    assert not (world.root / "runs").exists()


def test_without_preflight_it_is_started_all_the_same(here: Settings, world: World) -> None:
    stand_in(here)

    assert start.train(here, world.toml(xformers=True, sdpa=False), TrainOptions(preflight=False)).ok


def test_warnings_are_told_and_do_not_stop(
    here: Settings, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(here)

    assert start.train(here, world.toml(caption_extension=".caption"), TrainOptions()).ok
    assert "caption_extension is .caption" in capfd.readouterr().err


def test_paths_are_meant_from_the_settings_or_from_where_the_user_stands(
    here: Settings, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(here)
    apart = tmp_path / "apart"
    apart.mkdir()
    file = world.toml(train_data_dir="data", output_dir="out")
    monkeypatch.chdir(apart)
    start.train(here, file, TrainOptions())
    assert told(runs.find(file))[1] == str(world.root)

    moved = file.rename(apart / "train.toml")
    monkeypatch.chdir(world.root)
    start.train(here, moved, TrainOptions())
    assert told(runs.find(moved))[1] == str(world.root)


def test_a_known_failure_in_the_log_is_explained(here: Settings, world: World) -> None:
    stand_in(here, FAIL)

    found = fails(start.train(here, world.toml(), TrainOptions()))

    assert "mixed_precision" in found["known failure"].fix


def test_a_loss_that_is_not_finite_is_explained(here: Settings, world: World) -> None:
    stand_in(here, NOT_FINITE)

    found = fails(start.train(here, world.toml(), TrainOptions()))

    assert "step 4 is nan" in found["not finite"].detail
    assert "learning_rate" in found["not finite"].fix


def test_want_of_memory_names_settings_that_need_less_with_the_estimates(
    here: Settings, world: World
) -> None:
    stand_in(here, NO_MEMORY)
    file = world.toml(train_batch_size=4, gradient_checkpointing=False, cache_latents=False)

    found = fails(start.train(here, file, TrainOptions(preflight=False)))

    fix = found["memory"].fix
    assert fix.index("gradient_checkpointing = true (about") < fix.index("train_batch_size = 1 (about")
    assert "predicted" in fix


def test_a_full_disk_is_said_with_how_to_go_on(here: Settings, world: World) -> None:
    stand_in(here, NO_DISK)

    found = fails(start.train(here, world.toml(), TrainOptions()))

    assert "3 MB left" in found["disk"].detail
    assert "--resume` continues after step 3" in found["training"].fix


def test_a_killed_training_is_resumed_from_its_last_state(here: Settings, world: World) -> None:
    stand_in(here, DIE)
    killed = start.train(here, world.toml(), TrainOptions())
    assert killed.extra["state"] is State.DIED
    assert "--resume` continues after step 3" in fails(killed)["training"].fix

    report = start.train(here, world.root, TrainOptions(resume=True))

    run = runs.find(world.root)
    assert report.extra["state"] is State.FINISHED
    assert [step.step for step in run.steps()] == [1, 2, 3, 4, 5, 6]
    assert [again.step for again in run.record().resumed] == [3]
    assert len(list((world.root / "runs").iterdir())) == 1


def test_a_resumed_run_goes_on_with_the_settings_that_it_began_with(
    here: Settings, world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(here, DIE)
    start.train(here, world.toml(), TrainOptions())
    began_with = runs.find(world.root).settings.read_bytes()
    world.toml(learning_rate=5e-4)

    start.train(here, world.root, TrainOptions(resume=True))

    assert runs.find(world.root).settings.read_bytes() == began_with
    assert "has changed since" in capfd.readouterr().err


def test_a_detached_training_is_looked_at_and_stopped_from_elsewhere(here: Settings, world: World) -> None:
    stand_in(here, WAIT)

    started = start.train(here, world.toml(), TrainOptions(detach=True))
    run = Run(Path(started.extra["run"]))
    _until(lambda: len(run.steps()) == 4)
    assert run.state() is State.RUNNING
    report = follow.stop(world.root)

    assert report.extra["state"] is State.STOPPED
    assert "--resume` continues after step" in report.checks[0].fix
    with pytest.raises(UsageError, match="is not running"):
        follow.stop(world.root)
    assert follow.logs(world.root).extra["state"] is State.STOPPED


def test_an_interrupt_saves_first_and_says_how_to_go_on(here: Settings, world: World) -> None:
    stand_in(here, WAIT)
    # Whoever started the tests may have ignored it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        _until(lambda: any(len(Run(p.parent).steps()) == 4 for p in world.root.glob("runs/*/run.json")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(Stopped, match=r"its state saved[^$]*--resume` continues after step") as stopped:
            start.train(here, world.toml(), TrainOptions())
    finally:
        signal.signal(signal.SIGINT, before)

    assert stopped.value.exit_code == 130
    assert runs.find(world.root).state() is State.STOPPED


def test_several_processes_use_the_configuration_of_the_home(here: Settings, world: World) -> None:
    stand_in(here)
    Installation(here.home).distributed_config.write_text("num_processes: 2\n")

    start.train(here, world.toml(), TrainOptions())

    words, _, _ = told(runs.find(world.root))
    assert words[words.index("--config_file") + 1] == str(Installation(here.home).distributed_config)


def test_only_a_small_model_is_trained_by_way_of_the_shrinking_script(here: Settings, world: World) -> None:
    stand_in(here)
    model = world.root / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    file = world.toml(pretrained_model_name_or_path="model")
    start.train(here, file, TrainOptions(preflight=False))
    assert not any(word.endswith("small_trainer.py") for word in told(runs.find(world.root))[0])

    (model / start.SMALL_MARK).touch()
    start.train(here, file, TrainOptions(preflight=False))
    assert any(word.endswith("small_trainer.py") for word in told(runs.find(world.root))[0])


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
