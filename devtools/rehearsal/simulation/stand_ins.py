"""What Python code asks torch about its devices, answered as a Mac answers.

``torch.mps`` and ``torch.backends.mps`` are thin: they ask ``torch._C``, where Linux builds
lack the functions. Those are put there. In turn the functions of CUDA are taken away, so that
torch's own Python code says what it says in a build without CUDA.
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

# Programs ask these to find out that there is no CUDA, which is their good right.
_QUESTIONS = {
    "is_available", "is_initialized", "device_count", "is_bf16_supported", "is_current_stream_capturing",
    "amp_definitely_not_available", "get_arch_list", "get_gencode_flags", "is_tf32_supported",
}  # fmt: skip
_TORCH = str(Path(torch.__file__).parent)


def install(recorder: Recorder, *, macos: tuple[int, int], memory: int) -> None:
    """Stand in for the Mac.

    Args:
        recorder: where calls into ``torch.cuda`` are written down.
        macos: the version of macOS to answer with.
        memory: the bytes of memory that Metal recommends to use at most.
    """
    _stand_in_for_mps(macos, memory)
    _take_cuda_away(recorder)
    _make_tensors_from_data()
    _make_generators()


def _stand_in_for_mps(macos: tuple[int, int], memory: int) -> None:
    """``torch.mps`` and ``torch.backends.mps``; there is no allocator, so nothing is allocated."""
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
    # Rehearsals run in copies of a process, which CUDA does not like; there is no CUDA.
    torch.cuda._is_in_bad_fork = lambda: False
    for module in [module for name, module in sys.modules.items() if name.startswith("torch.cuda")]:
        for name, function in list(vars(module).items()):
            theirs = isinstance(function, FunctionType) and function.__module__.startswith("torch.cuda")
            if theirs and not name.startswith("_") and name not in _QUESTIONS:
                setattr(module, name, _recorded(function, recorder))
    # C++ calls it as well, for instance for tensor.to("cuda").
    torch.cuda._lazy_init = _recorded(torch.cuda._lazy_init, recorder)


def _recorded(function: Any, recorder: Recorder) -> Any:
    """``function``, writing down who called it and whether that raised."""
    what = "making CUDA ready" if function.__name__ == "_lazy_init" else f"torch.cuda.{function.__name__}"

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        by_torch = sys._getframe(1).f_code.co_filename.startswith(_TORCH)
        try:
            outcome = function(*args, **kwargs)
        except Exception as error:
            # Written down once, by the innermost function that the program did not call itself.
            if not getattr(error, "recorded", False):
                recorder.finding(Kind.CUDA, what, f"{type(error).__name__}: {error}")
                error.recorded = True  # type: ignore[attr-defined]
            raise
        if not by_torch:
            recorder.finding(Kind.CUDA, what)
        return outcome

    return called


def _make_tensors_from_data() -> None:
    """``torch.tensor`` and its like copy to the device where no dispatch mode can see it."""

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
    """``torch.Generator("mps")``: a CPU generator that says so."""
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
            # C++ hands its own wrapper to the simulator: they are known by the address behind.
            GENERATORS[generator._cdata] = generator
            return generator

        @property
        def device(self) -> torch.device:
            return DEVICE

    torch.Generator = Generator
