"""Mach-O files that are nothing but their headers and load commands."""

from __future__ import annotations

import struct

ARM64, X86_64 = 0x0100000C, 0x01000007
DYLIB, BUNDLE, OBJECT = 6, 8, 1
MACOS, IOS = 1, 2
LC_ID, LC_LOAD, LC_WEAK, LC_RPATH, LC_BUILD = 0xD, 0xC, 0x80000018, 0x8000001C, 0x32
SYSTEM = "/usr/lib/libSystem.B.dylib"


def native(
    *loads: str,
    name: str = "",
    rpaths: tuple[str, ...] = (),
    weak: tuple[str, ...] = (),
    minos: tuple[int, int] | None = (11, 0),
    cpu: int = ARM64,
    subtype: int = 0,
    kind: int = BUNDLE,
    platform: int = MACOS,
) -> bytes:
    """A Mach-O file that is nothing but its load commands (<mach-o/loader.h>)."""

    def text(command: int, fixed: bytes, value: str) -> bytes:
        raw = value.encode() + b"\0"
        size = -(-(8 + 4 + len(fixed) + len(raw)) // 8) * 8
        head = struct.pack("<III", command, size, 12 + len(fixed)) + fixed
        return (head + raw).ljust(size, b"\0")

    versions = struct.pack("<III", 2, 0x10000, 0x10000)
    commands = [text(LC_ID, versions, name)] if name else []
    commands += [text(LC_LOAD, versions, load) for load in loads]
    commands += [text(LC_WEAK, versions, load) for load in weak]
    commands += [text(LC_RPATH, b"", rpath) for rpath in rpaths]
    if minos:
        stated = minos[0] << 16 | minos[1] << 8
        commands.append(struct.pack("<IIIIII", LC_BUILD, 24, platform, stated, stated, 0))
    body = b"".join(commands)
    return struct.pack("<IIIIIIII", 0xFEEDFACF, cpu, subtype, kind, len(commands), len(body), 0, 0) + body


def fat(*slices: tuple[int, bytes]) -> bytes:
    """A file with a slice for each processor (<mach-o/fat.h>), each at a multiple of 4096."""
    head, body = struct.pack(">II", 0xCAFEBABE, len(slices)), b""
    for number, (cpu, content) in enumerate(slices, 1):
        head += struct.pack(">IIIII", cpu, 0, 4096 * number, len(content), 12)
        body += content.ljust(4096, b"\0")
    return head.ljust(4096, b"\0") + body
