"""A program with faults that matter only on MPS, for the tests of the rehearsals.

usage: planted_faults.py FILE

It runs under the trainer's interpreter. The line of each fault has its name in a comment. How each
fault ended is written to FILE as JSON.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MATRIX = torch.eye(4).to("mps") + 1


def no_kernel() -> Any:
    return torch.linalg.qr(MATRIX)  # fault: no kernel


def listed_fallback() -> Any:
    return torch.linalg.svd(MATRIX).S.sum().item()  # fault: listed fallback


def double_precision() -> Any:
    return MATRIX.to(torch.float64)  # fault: float64


def double_precision_from_numbers() -> Any:
    return torch.tensor([1.0], dtype=torch.float64, device="mps")  # fault: float64 numbers


def eighth_precision() -> Any:
    return MATRIX.to(torch.float8_e4m3fn)  # fault: float8


def mixed_devices() -> Any:
    return MATRIX + torch.ones(4)  # fault: mixed devices


def indexing_the_cpu() -> Any:
    return torch.arange(4)[torch.tensor([1], device="mps")]  # fault: indices


def cuda_state() -> Any:
    return torch.cuda.get_rng_state()  # fault: torch.cuda


def to_cuda() -> Any:
    return torch.ones(1).cuda()  # fault: to cuda


def cpu_generator() -> Any:
    return torch.randn(2, device="mps", generator=torch.Generator())  # fault: generator


def integers() -> Any:
    return torch.ones(2, 2, dtype=torch.int64, device="mps").matmul(
        torch.ones(2, 2, dtype=torch.int64, device="mps")
    )


def gradient_without_kernel() -> Any:
    picture = torch.ones(1, 1, 4, 4, device="mps", requires_grad=True)
    grid = torch.zeros(1, 2, 2, 2, device="mps")
    sampled = torch.nn.functional.grid_sample(picture, grid, align_corners=False)  # fault: gradient
    return sampled.sum().backward()


def what_is_fine() -> Any:
    """None of this is a fault on a Mac."""
    assert not torch.cuda.is_available()
    assert torch.backends.mps.is_available()
    assert torch.mps.current_allocated_memory() == 0
    index = MATRIX[torch.tensor([0, 1])]
    generator = torch.Generator("mps").manual_seed(1)
    noise = torch.randn(2, 4, device="mps", generator=generator)
    return float((index + torch.tensor(2.0) + noise * 0).sum())


def in_place_shapes() -> Any:
    tensor = torch.arange(6, device="mps").reshape(2, 3)
    tensor.t_().unsqueeze_(0)
    return [list(tensor.shape), tensor.tolist()]


def device_of_everything() -> Any:
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    layer.to("mps")
    assert layer.weight is weight
    assert isinstance(copy.deepcopy(layer).weight, torch.nn.Parameter)
    return [str(weight.device), str(torch.zeros_like(weight).device), str(weight.cpu().device)]


ATTEMPTS: tuple[Callable[[], Any], ...] = (
    no_kernel, listed_fallback, double_precision, double_precision_from_numbers, eighth_precision, mixed_devices,
    indexing_the_cpu, cuda_state, to_cuda, cpu_generator, integers, gradient_without_kernel, what_is_fine, in_place_shapes,
    device_of_everything,
)  # fmt: skip


def main() -> None:
    ended: dict[str, Any] = {}
    for attempt in ATTEMPTS:
        try:
            ended[attempt.__name__] = attempt()
        except Exception as error:  # the tests look at how each fault ends
            ended[attempt.__name__] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(ended, default=repr))


if __name__ == "__main__":
    main()
