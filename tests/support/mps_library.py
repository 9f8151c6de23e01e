"""A Mach-O library for arm64 with functions that register MPS kernels, as torch's library has them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

_TEXT, _STRINGS = 0x1000, 0x8000
_ADD_X1, _MOVE_X1_X8, _NOTHING, _RETURN = 0x91000021, 0xAA0803E1, 0xD503201F, 0xD65F03C0

GENERATED = "__ZN2at12_GLOBAL__N_142TORCH_LIBRARY_IMPL_init_aten_MPS_1ERN5torch7LibraryE"
BY_HAND = "__ZN2atL35TORCH_LIBRARY_IMPL_init_aten_MPS_2ERN5torch7LibraryE"
_IMPL = "__ZNR5torch7Library5_implEPKcONS_11CppFunctionE"
_FROM_FUNCTION = "__ZN5torch11CppFunctionC1IFvvEEEPT_"


class Registration(msgspec.Struct, frozen=True):
    """One ``m.impl(name, kernel)``; a ``general`` kernel serves any operator and has no signature."""

    name: str
    general: bool = False


def write(path: Path, functions: Mapping[str, Sequence[Registration]], *, extra: bytes = b"") -> Path:
    """Write a library with these functions by symbol; ``extra`` is text among its strings."""
    names = [each.name.encode() + b"\0" for calls in functions.values() for each in calls]
    strings, offsets = b"", {}
    for name in names:
        offsets[name[:-1].decode()] = _STRINGS + len(strings)
        strings += name
    length = sum(4 * (4 * len(calls) + 1) for calls in functions.values())
    impl, from_function = _TEXT + length, _TEXT + length + 4
    code, symbols = b"", {}
    for symbol, calls in functions.items():
        symbols[symbol] = _TEXT + len(code)
        for number, call in enumerate(calls):
            code += _call(_TEXT + len(code), call, offsets[call.name], impl, from_function, number % 2 == 0)
        code += struct.pack("<I", _RETURN)
    assert len(code) == length
    symbols |= {_IMPL: impl, _FROM_FUNCTION: from_function, "_end": from_function + 4}
    code += struct.pack("<III", _RETURN, _RETURN, _RETURN)
    path.write_bytes(_mach_o(code, strings + extra, symbols))
    return path


def _call(at: int, call: Registration, string: int, impl: int, from_function: int, near: bool) -> bytes:
    """Four instructions: the name into x1 in one of two ways, the kernel where it has a signature, the call."""
    # adr x1; add x1, x1, #0 -- or adr x8; mov x1, x8
    load = (_address(1, string - at), _ADD_X1) if near else (_address(8, string - at), _MOVE_X1_X8)
    kernel = _NOTHING if call.general else _branch(from_function - (at + 8))
    return struct.pack("<IIII", *load, kernel, _branch(impl - (at + 12)))


def _address(register: int, distance: int) -> int:
    return 0x10000000 | (distance & 3) << 29 | (distance >> 2 & 0x7FFFF) << 5 | register


def _branch(distance: int) -> int:
    return 0x94000000 | (distance >> 2 & 0x3FFFFFF)


def _mach_o(code: bytes, strings: bytes, symbols: dict[str, int]) -> bytes:
    head = 32 + 72 + 2 * 80 + 24
    names, entries = b"\0", b""
    for name, value in symbols.items():
        entries += struct.pack("<IBBHQ", len(names), 0x0F, 1, 0, value)
        names += name.encode() + b"\0"
    at_strings = head + len(code)
    at_symbols = at_strings + len(strings)

    def section(name: bytes, address: int, content: bytes, offset: int) -> bytes:
        numbers = (address, len(content), offset, 0, 0, 0, 0, 0, 0, 0)
        return struct.pack("<16s16sQQIIIIIIII", name, b"__TEXT", *numbers)

    total = at_symbols + len(entries) + len(names)
    segment = struct.pack("<II16sQQQQIIII", 0x19, 72 + 160, b"__TEXT", 0, 0x10000, 0, total, 7, 5, 2, 0)
    segment += section(b"__text", _TEXT, code, head) + section(b"__cstring", _STRINGS, strings, at_strings)
    table = (at_symbols, len(symbols), at_symbols + len(entries), len(names))
    commands = segment + struct.pack("<IIIIII", 0x2, 24, *table)
    header = struct.pack("<IIIIIIII", 0xFEEDFACF, 0x0100000C, 0, 6, 2, len(commands), 0, 0)
    return header + commands + code + strings + entries + names
