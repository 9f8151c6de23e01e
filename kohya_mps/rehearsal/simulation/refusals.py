"""What the MPS device refuses although there is a kernel: rules with their source.

Only refusals that torch's own code states are here. The texts are torch's, so that a log of
a rehearsal reads like a log of a Mac. File names are those of torch 2.5.1's ``aten/src/ATen``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_Arguments = tuple[Any, ...]


def dtype(kind: torch.dtype) -> TypeError | None:
    """Nothing of double precision can be made on the device (mps/EmptyTensor.cpp)."""
    if kind == torch.float64:
        return TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
            "Please use float32 instead."
        )
    if kind == torch.complex128:
        return TypeError(
            "Trying to convert ComplexDouble to the MPS backend but it does not have support for that dtype."
        )
    return None


def devices(name: str, tensors: list[torch.Tensor], *, indexing: bool) -> RuntimeError | None:
    """Tensors of two devices in one operation (TensorIterator.cpp).

    A CPU tensor without dimensions counts as a number. Indices may be on the CPU, but a CPU
    tensor cannot be indexed with those of another device (native/TensorAdvancedIndexing.cpp).
    """
    if indexing:
        if tensors[0].device.type == "cpu" and any(tensor.device.type != "cpu" for tensor in tensors[1:]):
            return RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        return None
    if any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in tensors):
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!"
        )
    return None


@dataclass(frozen=True)
class Rule:
    """A kernel that refuses some of its arguments.

    Attributes:
        operators: the overloads.
        applies: whether these arguments are refused.
        error: what torch raises.
        source: where torch's code says so.
        until: the first torch version without the rule, where that is known.
    """

    operators: tuple[str, ...]
    applies: Callable[[_Arguments], bool]
    error: Exception
    source: str
    until: tuple[int, int] = (99, 0)


RULES: tuple[Rule, ...] = ()


def reason(name: str, args: _Arguments, kwargs: dict[str, Any], version: str) -> Exception | None:
    """The error that a Mac raises for this call, or nothing."""
    rules = _BY_OPERATOR.get(name)
    if not rules:
        return None
    now = tuple(int(part) for part in version.split(".")[:2])
    given = (*args, *kwargs.values())
    return next((rule.error for rule in rules if now < rule.until and rule.applies(given)), None)


_BY_OPERATOR: dict[str, list[Rule]] = {}
for _rule in RULES:
    for _name in _rule.operators:
        _BY_OPERATOR.setdefault(_name, []).append(_rule)
