"""Runs for tests: directories as a training leaves them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.train.runs import Process, Record, Run


def made(
    project: Path,
    *,
    run: Run | None = None,
    settings: str = "train.toml",
    process: Process | None = None,
    **changed: Any,
) -> Run:
    """A run's directory with its record, of which a test may change fields, and its copy of the settings."""
    run = run or Run(project / "runs" / "2026-01-02_03-04-05")
    run.output.mkdir(parents=True, exist_ok=True)
    run.settings.write_text(
        'network_module = "networks.lora"\nsample_prompts = "prompts.txt"\n# <b>mine</b>\n'
    )
    record = Record(
        name="cat",
        settings=str(project / settings),
        base=str(project),
        model="model.safetensors",
        family="sd15",
        trainer="train_network.py",
        expected_device="cpu",
        command=("python", "train_network.py"),
        started="2026-01-02T03:04:05+00:00",
        generation="validated-1",
        profile="validated",
        lock="ab" * 32,
        accelerate_config="cd" * 32,
        packages={"torch": "2.5.1"},
        commits=None,
        process=process,
    )
    run.save(msgspec.structs.replace(record, **changed))
    return run


def begin(run: Run, *, total: int = 30, device: str = "cpu", processes: int = 1, pid: int = 1) -> None:
    """Write what the trainer reports before its first step."""
    begun = {"total": total, "device": device, "processes": processes, "pid": pid}
    run.begun_file.write_text(json.dumps(begun))


def end(run: Run, how: str, step: int, error: str = "") -> None:
    """Write the end that the trainer reports."""
    run.ended_file.write_text(json.dumps({"how": how, "step": step, "error": error}))


def save_state(run: Run, name: str, step: int) -> Path:
    """Write a saved state, as far as a resumption looks at it."""
    state = run.output / name
    state.mkdir(parents=True)
    (state / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": step}))
    (state / "watched_0.pt").touch()
    return state


def killed_process() -> Process:
    """A process that was killed."""
    child = subprocess.Popen(["sleep", "60"])
    process = Process.of(child.pid)
    child.kill()
    child.wait()
    return process


def step_line(number: int, loss: float | None = None, seconds: float = 0.5) -> str:
    """A line of steps.jsonl; the loss falls unless it is given."""
    value = 1.0 / number if loss is None else loss
    line = {
        "step": number,
        "epoch": 1 + number // 10,
        "time": 1_700_000_000.0 + number * seconds,
        "loss": value,
        "average": value,
        "memory": 2_000_000_000,
        "rates": {"unet": 1e-4, "textencoder": 5e-5},
    }
    return json.dumps(line) + "\n"


# run.json as version 0.1.0 wrote it; PROJECT is the project's path.
_RECORD_0_1_0 = """\
{
  "name": "old_cat",
  "settings": "PROJECT/train.toml",
  "base": "PROJECT",
  "model": "MODEL",
  "family": "sd15",
  "trainer": "train_network.py",
  "expected_device": "cpu",
  "command": [
    "/home/somebody/tools/kohya_ss/.kohya-mps/generations/20260101-000000-validated/venv/bin/python",
    "-P",
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch"
  ],
  "started": "2026-01-02T03:04:05+00:00",
  "generation": "20260101-000000-validated",
  "profile": "validated",
  "lock": "1111111111111111111111111111111111111111111111111111111111111111",
  "accelerate_config": "2222222222222222222222222222222222222222222222222222222222222222",
  "packages": {
    "torch": "2.5.1",
    "accelerate": "1.3.0"
  },
  "commits": {
    "kohya_ss": "3333333333333333333333333333333333333333",
    "sd_scripts": "4444444444444444444444444444444444444444"
  },
  "resumed": [
    {
      "at": "2026-01-02T04:04:05+00:00",
      "step": 2,
      "generation": "20260101-000000-validated"
    }
  ],
  "process": {
    "pid": 4194303,
    "began": 1767323045.25
  }
}"""

_STEPS_0_1_0 = """\
{"step": 1, "epoch": 1, "time": 1767323050.1, "loss": 0.21, "average": 0.21, "memory": 3000000000, "rates": {"textencoder": 5e-05, "unet": 0.0001}}
{"step": 2, "epoch": 1, "time": 1767323051.3, "loss": 0.18, "average": 0.195, "memory": 3100000000, "rates": {"textencoder": 5e-05, "unet": 0.0001}}
{"step": 3, "epoch": 1, "time": 1767326650.9, "loss": 0.16, "average": 0.183, "memory": 3100000000, "rates": {"textencoder": 5e-05, "unet": 0.0001}}
{"step": 4, "epoch": 2, "time": 1767326652.1, "loss": 0.15, "average": 0.175, "memory": 3100000000, "rates": {"textencoder": 5e-05, "unet": 0.0001}}
"""  # noqa: E501


def made_by_0_1_0(project: Path, settings: Path, model: Path) -> Run:
    """A run's directory as version 0.1.0 left it: resumed once, then stopped after step 4."""
    run = project / "runs" / "2026-01-02_03-04-05"
    state = run / "output" / "old_cat-step00000004-state"
    state.mkdir(parents=True)
    (state / "train_state.json").write_text('{"current_epoch": 2, "current_step": 4}')
    (state / "watched_0.pt").touch()
    (run / "run.json").write_text(_RECORD_0_1_0.replace("PROJECT", str(project)).replace("MODEL", str(model)))
    (run / "train.toml").write_bytes(settings.read_bytes())
    (run / "steps.jsonl").write_text(_STEPS_0_1_0)
    (run / "begun.json").write_text('{"total": 6, "device": "cpu", "processes": 1, "pid": 4194303}')
    (run / "ended.json").write_text('{"how": "stopped", "step": 4, "error": ""}')
    (run / "stop").touch()
    (run / "trainer.log").write_text("loading\nWARNING   old and known\nsteps:  50%\rsteps:  66%\n")
    (run / "logs").mkdir()
    return Run(run)
