"""Train on the simulated device or on the CPU, and write down what happened."""

from __future__ import annotations

import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from kohya_mps.probes import small_trainer

from .. import record
from ..record import Record
from ..request import Request
from .recorder import Recorder, raised_at
from .start import simulate


def train(request: Request) -> Record:
    """Run the script of the request in this process, which can do nothing else afterwards."""
    recorder = Recorder()
    losses: list[float] = []
    error = error_at = ""
    started = time.monotonic()
    try:
        if request.device == "mps":
            simulate(recorder, fallback=request.fallback)
        _note_losses(losses)
        _run(request)
    except SystemExit as stop:
        error = "" if stop.code in (None, 0) else f"the script ended with {stop.code}"
    except BaseException as reason:  # the report is about whatever ends a training
        traceback.print_exc()
        error, error_at = f"{type(reason).__name__}: {reason}", raised_at(reason)
    return Record(
        device=request.device,
        torch=torch.__version__,
        losses=tuple(losses),
        seconds=round(time.monotonic() - started, 2),
        error=error,
        error_at=error_at,
        operators=recorder.operators(),
        findings=recorder.findings(),
    )


def train_and_record(request: Request) -> None:
    """Train, and write the record to the file that the request names."""
    record.write(Path(request.result), train(request))


def _run(request: Request) -> None:
    sys.argv = [request.script, *request.arguments]
    sys.path.insert(0, str(Path(request.script).parent))
    if request.small:
        small_trainer.shrink()
    runpy.run_path(request.script, run_name="__main__")


def _note_losses(losses: list[float]) -> None:
    """Every loss that is trained on goes through accelerate, in kohya's trainers as elsewhere."""
    import accelerate

    backward = accelerate.Accelerator.backward

    def noted(self: Any, loss: torch.Tensor, **options: Any) -> Any:
        value = loss.detach()
        losses.append(float(getattr(value, "cpu_tensor", value)))
        return backward(self, loss, **options)

    accelerate.Accelerator.backward = noted
