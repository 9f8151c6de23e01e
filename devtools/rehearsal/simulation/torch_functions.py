"""torch's Python functions about devices, with the answers that they have on a Mac.

``torch.mps`` and ``torch.backends.mps`` are thin: they call functions of ``torch._C`` that Linux
builds lack. Those are added. The functions of CUDA are removed, so that torch's own Python code
behaves as in a build without CUDA.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from ..record import Kind
from .device import DEVICE, GENERATORS, SimulatedTensor
from .recorder import Recorder

# Programs call these to find out whether there is CUDA, which is no fault.
_QUERIES = {
    "is_available", "is_initialized", "device_count", "is_bf16_supported", "is_current_stream_capturing",
    "amp_definitely_not_available", "get_arch_list", "get_gencode_flags", "is_tf32_supported",
}  # fmt: skip
_TORCH = str(Path(torch.__file__).parent)


def install(recorder: Recorder, *, macos: tuple[int, int], memory: int) -> None:
    """Stand in for the Mac.

    Args:
        recorder: notes the calls into ``torch.cuda``.
        macos: the version of macOS that is simulated.
        memory: the bytes that Metal recommends to use at most.
    """
    _stand_in_for_mps(macos, memory)
    _take_cuda_away(recorder)
    _make_tensors_from_data()
    _make_generators()


def _stand_in_for_mps(macos: tuple[int, int], memory: int) -> None:
    """Add the functions of ``torch.mps`` and ``torch.backends.mps``; no memory is ever allocated."""
    answers: dict[str, Callable[..., Any]] = {
        "_mps_is_available": lambda: True,
        "_mps_is_on_macos_or_newer": lambda major, minor: (major, minor) <= macos,
        "_mps_get_name": lambda: "Simulated MPS",
        "_mps_get_core_count": lambda: 8,
        "_mps_is_in_bad_fork": lambda: False,
        "_mps_deviceSynchronize": lambda: None,
        "_mps_emptyCache": lambda: None,
        "_mps_setMemoryFraction": lambda _fraction: None,
        "_mps_currentAllocatedMemory": lambda: 0,
        "_mps_driverAllocatedMemory": lambda: 0,
        "_mps_recommendedMaxMemory": lambda: memory,
        # Random numbers are drawn by the CPU's generator: the losses are then those of the CPU.
        "_mps_get_default_generator": lambda: torch.default_generator,
    }
    torch._C._has_mps = True
    for name, answer in answers.items():
        setattr(torch._C, name, answer)
    for name in ("is_available", "is_macos_or_newer", "is_macos13_or_newer", "get_name", "get_core_count"):
        clear = getattr(getattr(torch.backends.mps, name, None), "cache_clear", None)
        if clear is not None:
            clear()
    # torch.random would seed the same generator a second time.
    torch.mps.manual_seed = lambda _seed: None


def _take_cuda_away(recorder: Recorder) -> None:
    for name in [name for name in vars(torch._C) if name.startswith("_cuda_")]:
        delattr(torch._C, name)
    torch.version.cuda = None
    # Rehearsals run in copies of a process, which CUDA refuses; there is no CUDA here.
    torch.cuda._is_in_bad_fork = lambda: False
    for module in [module for name, module in sys.modules.items() if name.startswith("torch.cuda")]:
        for name, function in list(vars(module).items()):
            theirs = isinstance(function, FunctionType) and function.__module__.startswith("torch.cuda")
            if theirs and not name.startswith("_") and name not in _QUERIES:
                setattr(module, name, _recorded(function, recorder))
    # C++ calls it as well, for instance for tensor.to("cuda").
    torch.cuda._lazy_init = _recorded(torch.cuda._lazy_init, recorder)


def _recorded(function: Any, recorder: Recorder) -> Any:
    """``function``, with a note of each call and of the error that it raised."""
    what = "making CUDA ready" if function.__name__ == "_lazy_init" else f"torch.cuda.{function.__name__}"

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        by_torch = sys._getframe(1).f_code.co_filename.startswith(_TORCH)
        try:
            outcome = function(*args, **kwargs)
        except Exception as error:
            # Noted once, by the innermost function.
            if not getattr(error, "recorded", False):
                recorder.finding(Kind.CUDA, what, f"{type(error).__name__}: {error}")
                error.recorded = True  # type: ignore[attr-defined]
            raise
        if not by_torch:
            recorder.finding(Kind.CUDA, what)
        return outcome

    return called


def _make_tensors_from_data() -> None:
    """Have ``torch.tensor`` and its kind copy to the device where a dispatch mode sees it."""

    def to_device(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is None or torch.device(device).type != "mps":
                return function(*args, **kwargs)
            kwargs = {**kwargs, "device": "cpu"}
            wants_gradient = kwargs.pop("requires_grad", False)
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs).to(DEVICE).requires_grad_(wants_gradient)

        return make

    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, to_device(getattr(torch, name)))

    def new_tensor(self: torch.Tensor, data: Any, **options: Any) -> torch.Tensor:
        return torch.tensor(data, **{"device": self.device, "dtype": self.dtype, **options})

    SimulatedTensor.new_tensor = new_tensor


def _make_generators() -> None:
    """Have ``torch.Generator("mps")`` make a CPU generator that reports the device."""
    original: Any = torch.Generator
    kind: Any = type(original)

    class _Both(kind):
        def __instancecheck__(self, instance: Any) -> bool:
            return isinstance(instance, original)

    class Generator(original, metaclass=_Both):
        def __new__(cls, device: Any = "cpu") -> Any:
            if torch.device(device).type != "mps":
                return original(device=device)
            generator = original.__new__(cls, device="cpu")
            # C++ passes its own wrapper to the simulator: the address behind it identifies it.
            GENERATORS[generator._cdata] = generator
            return generator

        @property
        def device(self) -> torch.device:
            return DEVICE

    torch.Generator = Generator
