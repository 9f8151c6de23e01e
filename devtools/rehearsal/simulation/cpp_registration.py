"""Register the device with torch's C++ side: its guard, and which accelerator there is.

torch asks a *device guard* for the current device, for streams and for the number of devices.
Builds for Linux have none for MPS, and without one a backward pass ends in an internal
assertion. In C++ it would be five lines, and would need a compiler. Here the tables of virtual
functions of objects that torch already has are copied, and methods of the copy are replaced,
which needs none. The positions of the methods are checked before anything is changed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

# c10/core/DeviceType.h: the numbers are part of torch's serialized formats and never change.
CUDA, MPS, META, PRIVATE_USE = 1, 13, 14, 20
_DEVICE_TYPES = 22
# Larger than any of the tables; copying past the end of one reads data that is never called.
_SLOTS = 48

_Table = ctypes.POINTER(ctypes.c_void_p)
_TYPE_METHOD = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)
_BOOL_METHOD = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
# c10::Device is two bytes, type and index.
_DEVICE_METHOD = ctypes.CFUNCTYPE(ctypes.c_uint16, ctypes.c_void_p)
# c10::impl::DeviceGuardImplInterface begins with these (torch 2.5).
_GUARD_SLOTS = {"type": 0, "exchangeDevice": 1, "getDevice": 2}
# at::AcceleratorHooksInterface begins with its two destructors, then these (torch 2.9 and later).
_HOOK_SLOTS = {"isBuilt": 2, "isAvailable": 3, "hasPrimaryContext": 4}

# What C++ points to must never be collected.
_kept: list[Any] = []


class GuardUnavailable(RuntimeError):
    """This torch has another layout than those that the simulation knows."""


def install() -> None:
    """Register a device guard for MPS, and make MPS the one accelerator.

    Raises:
        GuardUnavailable: this torch has an unknown layout; nothing was changed.
    """
    registry = _registry()
    if hasattr(torch._C, "_acc"):
        guard = _python_guard(registry)
        _become_the_accelerator()
        # With streams, the engine also asks the accelerator that the library was built for.
        registry[CUDA] = guard
    else:
        guard = _renamed_meta_guard(registry)
    registry[MPS] = guard


def _registry() -> Any:
    """``c10::impl::device_guard_impl_registry``: for each device type, the pointer to its guard."""
    symbol = "_ZN3c104impl26device_guard_impl_registryE"
    library = ctypes.CDLL(str(_libraries() / _file_name("c10")))
    try:
        return (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, symbol)
    except ValueError as error:
        raise GuardUnavailable(f"torch {torch.__version__} has no registry of device guards") from error


def _renamed_meta_guard(registry: Any) -> int:
    """A copy of the ``meta`` device's guard, which does nothing, that reports MPS.

    It is enough before torch 2.6, where nothing asks for a stream.
    """
    original = registry[META]
    type_method = _TYPE_METHOD(_table(original)[_GUARD_SLOTS["type"]]) if original else None
    if type_method is None or type_method(original) != META:
        raise GuardUnavailable(f"the guard of torch {torch.__version__}'s meta device is not as expected")
    the_only_one = _DEVICE_METHOD(lambda _guard: MPS)  # index 0 in the higher byte
    methods = {
        _GUARD_SLOTS["type"]: _TYPE_METHOD(lambda _guard: MPS),
        _GUARD_SLOTS["exchangeDevice"]: the_only_one,
        _GUARD_SLOTS["getDevice"]: the_only_one,
    }
    return _copy_with(original, methods)


def _python_guard(registry: Any) -> int:
    """A guard that torch lets Python define for another device, moved to the slot of MPS."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.MPS

    guard = Guard()
    _kept.append(guard)
    before = registry[PRIVATE_USE]
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    address, registry[PRIVATE_USE] = registry[PRIVATE_USE], before
    if not address:
        raise GuardUnavailable(f"torch {torch.__version__} did not register a guard from Python")
    return int(address)


def _become_the_accelerator() -> None:
    """Have ``torch.accelerator`` and the autograd engine see a build for MPS and not for CUDA."""
    library = ctypes.CDLL(str(_libraries() / _file_name("torch_cpu")))
    for symbol, present in (
        ("_ZN2at6detail12getCUDAHooksEv", False),
        ("_ZN2at6detail11getMPSHooksEv", True),
    ):
        get = getattr(library, symbol)
        get.restype = ctypes.c_void_p
        hooks = get()
        methods = {slot: _BOOL_METHOD(lambda _hooks, p=present: p) for slot in _HOOK_SLOTS.values()}
        copy = _copy_with(hooks, methods)
        _table_pointer(hooks)[0] = _table_pointer(copy)[0]
    found = torch._C._accelerator_getAccelerator()
    if found is None or found.type != "mps":
        raise GuardUnavailable(f"torch {torch.__version__} says that its accelerator is {found}, not mps")


def _copy_with(original: int, methods: dict[int, Any]) -> int:
    """The address of a new object with another one's virtual functions, some of them replaced."""
    table = (ctypes.c_void_p * _SLOTS)(*(_table(original)[slot] for slot in range(_SLOTS)))
    for slot, method in methods.items():
        table[slot] = ctypes.cast(method, ctypes.c_void_p)
    instance = ctypes.c_void_p(ctypes.addressof(table))
    _kept.extend((table, instance, *methods.values()))
    return ctypes.addressof(instance)


def _table(instance: int) -> Any:
    return ctypes.cast(_table_pointer(instance)[0], _Table)


def _table_pointer(instance: int) -> Any:
    return ctypes.cast(instance, _Table)


def _libraries() -> Path:
    return Path(torch.__file__).parent / "lib"


def _file_name(name: str) -> str:
    found = sorted(_libraries().glob(f"lib{name}.*"))
    if not found:
        raise GuardUnavailable(f"torch {torch.__version__} has no library {name}")
    return found[0].name
