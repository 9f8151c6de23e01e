"""Runs for tests: directories as a training leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from kohya_mps.train.runs import Process, Record, Run


def made(
    project: Path, *, run: Run | None = None, settings: str = "train.toml", process: Process | None = None
) -> Run:
    """A run's directory with its record and its copy of the settings."""
    run = run or Run(project / "runs" / "2026-01-02_03-04-05")
    run.output.mkdir(parents=True, exist_ok=True)
    run.settings.write_text(
        'network_module = "networks.lora"\nsample_prompts = "prompts.txt"\n# <b>mine</b>\n'
    )
    run.save(
        Record(
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
    )
    return run


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
