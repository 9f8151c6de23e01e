"""What the MPS device refuses although it has a kernel: rules with their source.

Only refusals that torch's own code states are here. Each applies to the versions whose macOS
library has its message (see :mod:`devtools.rehearsal.mps_messages`), so that the log of a rehearsal
reads like that of a Mac.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..mps_messages import Text

_Arguments = tuple[Any, ...]

# Types that the device does not know, by their names in C++ (native/mps/OperationUtils.mm, which
# refuses every type that it does not list; pytorch#148420 and pytorch#132624 for float8).
_UNKNOWN = {
    torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
    torch.float8_e4m3fnuz: "Float8_e4m3fnuz",
    torch.float8_e5m2fnuz: "Float8_e5m2fnuz",
}

# From macOS 15.1 torch 2.6 and later lift this limit of convolutions (native/mps/operations/
# Convolution.mm of v2.6.0); the Mac that is simulated is that new.
_LIFTED = {Text.CONVOLUTION_SIZE: (2, 6)}


def devices(others: list[torch.Tensor], indexed: torch.Tensor | None) -> RuntimeError | None:
    """The error for tensors of two devices in one operation, or None (TensorIterator.cpp).

    A CPU tensor without dimensions counts as a number. Indices may be on the CPU, but a CPU
    tensor cannot be indexed with those of another device (native/TensorAdvancedIndexing.cpp).

    Args:
        others: the tensors among the arguments that are not on the device.
        indexed: the tensor that is indexed, in the operations that do so.
    """
    if indexed is not None:
        if indexed.device.type == "cpu":
            return RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        return None
    if any(tensor.dim() > 0 for tensor in others):
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu!"
        )
    return None


@dataclass(frozen=True)
class Rule:
    """A kernel that refuses some arguments: its message, its overloads, and which arguments."""

    text: Text
    operators: tuple[str, ...]
    refuses: Callable[[_Arguments, dict[str, Any]], bool]
    error: type[Exception] = RuntimeError


def _integral(position: int) -> Callable[[_Arguments, dict[str, Any]], bool]:
    return lambda args, _kwargs: not (args[position].is_floating_point() or args[position].is_complex())


def _int64(args: _Arguments, _kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.int64 for value in args)


def _output_too_large(args: _Arguments, _kwargs: dict[str, Any]) -> bool:
    """Whether a dimension of the result is too large: any one, as in the loop of Convolution.mm."""
    tensor, weight, _, stride, padding, dilation, transposed, _output_padding = args[:8]
    if transposed:
        return False
    sizes = [weight.shape[0]]
    for axis, length in enumerate(tensor.shape[2:]):
        reach = dilation[axis % len(dilation)] * (weight.shape[2 + axis] - 1)
        padded = length + 2 * padding[axis % len(padding)]
        sizes.append((padded - reach - 1) // stride[axis % len(stride)] + 1)
    return max(sizes) > 1 << 16


def _not_divisible(args: _Arguments, _kwargs: dict[str, Any]) -> bool:
    sizes, output_sizes = args[0].shape[-2:], args[1]
    pairs = [(max(a, b), min(a, b)) for a, b in zip(sizes, output_sizes, strict=True)]
    return any(small and large % small for large, small in pairs)


def _truncates_half(args: _Arguments, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("rounding_mode") == "trunc" and args[0].dtype == torch.float16


def _scales(_args: _Arguments, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("grad_scale") is not None or kwargs.get("found_inf") is not None


RULES = (
    Rule(Text.LINEAR, ("linear",), _integral(0)),
    Rule(Text.LINEAR_WEIGHT, ("linear",), _integral(1)),
    Rule(Text.LINEAR_BACKWARD, ("linear_backward",), _integral(1)),
    Rule(Text.MM, ("mm", "mm.out"), _integral(0)),
    Rule(Text.BMM, ("bmm", "bmm.out"), _integral(0)),
    Rule(Text.ADDMM, ("addmm", "addmm.out"), _integral(1)),
    Rule(Text.BADDBMM, ("baddbmm", "baddbmm.out", "addbmm", "addbmm.out"), _integral(1)),
    Rule(Text.SIGMOID, ("sigmoid", "sigmoid_", "sigmoid.out"), _int64),
    Rule(Text.LOG1P, ("log1p", "log1p_", "log1p.out"), _int64),
    Rule(Text.ATAN2, ("atan2", "atan2_", "atan2.out"), _int64),
    Rule(Text.DOT, ("dot",), _int64),
    Rule(Text.TRUNC_DIVIDE, ("div.Tensor_mode", "div_.Tensor_mode"), _truncates_half),
    Rule(Text.CONVOLUTION, ("convolution", "_convolution"), _integral(0)),
    Rule(Text.CONVOLUTION_SIZE, ("convolution", "_convolution"), _output_too_large, NotImplementedError),
    Rule(
        Text.CONVOLUTION_TRANSPOSED,
        ("convolution", "_convolution"),
        lambda args, _kwargs: bool(args[6]) and args[0].dim() == 5,
    ),
    Rule(Text.ADAPTIVE_POOL, ("_adaptive_avg_pool2d", "adaptive_max_pool2d"), _not_divisible),
    Rule(Text.SOFTMAX, ("_softmax", "_log_softmax"), lambda args, _kwargs: bool(args[2])),
    Rule(
        Text.FUSED_OPTIMIZER,
        ("_fused_adam_", "_fused_adam_.tensor_lr", "_fused_adamw_", "_fused_adamw_.tensor_lr"),
        _scales,
    ),
)


class Refusals:
    """The rules of one torch version.

    Args:
        version: of torch.
        texts: the messages that the library of its macOS wheel has.
    """

    def __init__(self, version: str, texts: Iterable[str]) -> None:
        this_version = tuple(int(part) for part in version.split(".")[:2])
        present = set(texts)
        self._has_float8 = Text.FLOAT8_KERNEL.value in present
        self._rules: dict[str, list[Rule]] = {}
        for rule in RULES:
            if rule.text.value in present and this_version < _LIFTED.get(rule.text, (99, 0)):
                for name in rule.operators:
                    self._rules.setdefault(name, []).append(rule)

    def dtype(self, kind: torch.dtype) -> TypeError | None:
        """The error for a new tensor of this type on the device, or None (mps/EmptyTensor.cpp)."""
        if kind == torch.float64:
            return TypeError(Text.FLOAT64.value)
        if kind not in _UNKNOWN or (kind == torch.float8_e4m3fn and self._has_float8):
            return None
        return TypeError(
            f"Trying to convert {_UNKNOWN[kind]} to the MPS backend but it does not have support for that dtype."
        )

    def reason(self, name: str, args: _Arguments, kwargs: dict[str, Any]) -> Exception | None:
        """The error that a Mac raises for this call, or None."""
        for rule in self._rules.get(name, ()):
            if rule.refuses(args, kwargs):
                return rule.error(rule.text.value)
        return None
