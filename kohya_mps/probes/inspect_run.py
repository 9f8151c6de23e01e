"""Read the losses and the saved LoRA of a training, without torch.

usage: inspect_run.py LOGS LORA STARTS_AT_ZERO

STARTS_AT_ZERO is a regular expression for the names of the weights that are zero before the first
step. Prints JSON: losses, seconds_per_step, tensors, zero_start, trained, finite.
"""

import itertools
import json
import re
import statistics
import sys

import numpy as np
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer


def losses(directory: str) -> tuple[list[float], float | None]:
    """Each step's loss, and the median of the seconds between two steps.

    The times are between steps, so that the first one's warm-up does not count. The median
    ignores a step that also saved. It is None for a single step.
    """
    logs = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(directory)
    logs.Reload()
    for run in logs.Runs():
        accumulator: EventAccumulator = logs.GetAccumulator(run)
        if "loss/current" in accumulator.Tags()["scalars"]:
            events = accumulator.Scalars("loss/current")
            spans = [b.wall_time - a.wall_time for a, b in itertools.pairwise(events)]
            return [event.value for event in events], statistics.median(spans) if spans else None
    return [], None


def main() -> None:
    directory, lora, starts_at_zero = sys.argv[1:4]
    values, seconds = losses(directory)
    tensors = zero_start = trained = 0
    finite = True
    with safe_open(lora, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 -- not a dictionary
            weights = file.get_tensor(name)
            tensors += 1
            finite = finite and bool(np.isfinite(weights).all())
            if re.search(starts_at_zero, name):
                zero_start += 1
                trained += bool(np.any(weights))
    print(
        json.dumps(
            {
                "losses": values,
                "seconds_per_step": seconds,
                "tensors": tensors,
                "zero_start": zero_start,
                "trained": trained,
                "finite": finite,
            }
        )
    )


if __name__ == "__main__":
    main()
