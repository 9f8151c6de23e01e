"""What the library of a macOS wheel registers for MPS when it loads, read from its machine code.

torch registers kernels in functions named ``TORCH_LIBRARY_IMPL_init_aten_MPS_<n>``, each a
sequence of calls ``m.impl("name", kernel)``. Their symbols are in the library, so that the calls
can be found, and the names can be read from the register that carries the first argument.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed

# Generated code (RegisterMPS*.cpp) has an anonymous namespace; MPSFallback.mm has static functions.
_GENERATED = re.compile(r"__ZN2at12_GLOBAL__N_1\d+TORCH_LIBRARY_IMPL_init_aten_MPS_\d+ERN5torch7LibraryE")
_BY_HAND = re.compile(r"__ZN2atL\d+TORCH_LIBRARY_IMPL_init_aten_MPS_\d+ERN5torch7LibraryE")
# torch::Library::_impl(const char*, CppFunction&&, ...)
_IMPL = "__ZNR5torch7Library5_implEPKcONS_11CppFunction"
# CppFunction's constructor from a function with a signature; the fallback has none of its own.
_FROM_FUNCTION = re.compile(r"__ZN5torch11CppFunctionC[12]IF.*")


class Registrations(msgspec.Struct, frozen=True):
    """Overload names: with kernels, always sent to the CPU, and registered only to raise."""

    kernels: frozenset[str]
    fallback: frozenset[str]
    refused: frozenset[str]


class _Call(msgspec.Struct, frozen=True):
    """One ``m.impl``: ``general`` when the kernel serves any operator, as the fallback does."""

    name: str
    general: bool


def read(library: Path) -> Registrations:
    """Read a Mach-O library for arm64.

    Raises:
        StepFailed: it is not built as this reader expects.
    """
    image = _Image(library)
    generated = [call for function in image.functions(_GENERATED) for call in image.calls(function)]
    by_hand = [call for function in image.functions(_BY_HAND) for call in image.calls(function)]
    if not generated or not by_hand:
        raise StepFailed(f"{library}: no registrations for MPS were found in it")
    return Registrations(
        frozenset(call.name for call in generated),
        frozenset(call.name for call in by_hand if call.general),
        frozenset(call.name for call in by_hand if not call.general),
    )


class _Image:
    """The machine code, the strings and the symbols of a library."""

    def __init__(self, path: Path) -> None:
        import capstone
        import lief

        binary = lief.MachO.parse(str(path))
        image = binary.at(0) if binary is not None and len(binary) == 1 else None
        if image is None:
            raise StepFailed(f"{path}: is no Mach-O library for one architecture")
        self.path = path
        # The image is valid as long as ``binary`` is.
        sections = {section.name: section for section in image.sections}
        text, strings = sections["__text"], sections["__cstring"]
        self._code, self._characters = bytes(text.content), bytes(strings.content)
        self._code_start, self._characters_start = int(text.virtual_address), int(strings.virtual_address)
        self.symbols = {s.value: str(s.name) for s in image.symbols if s.value}
        self._starts = sorted(self.symbols)
        self._disassembler = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)

    def functions(self, pattern: re.Pattern[str]) -> list[int]:
        """The addresses of the functions whose symbols match."""
        return sorted(start for start, name in self.symbols.items() if pattern.fullmatch(name))

    def calls(self, start: int) -> Iterator[_Call]:
        """The calls of ``Library::_impl`` in a function, in their order.

        Follows the addresses that instructions load into registers, as far as the names need it.
        """
        registers: dict[str, int] = {}
        general = True
        for mnemonic, operands in self._instructions(start):
            first = operands[0] if operands else ""
            if mnemonic in ("adrp", "adr"):
                registers[first] = int(operands[1].removeprefix("#"), 16)
            elif mnemonic == "add" and operands[1] in registers and operands[2].startswith("#"):
                registers[first] = registers[operands[1]] + int(operands[2].removeprefix("#"), 0)
            elif mnemonic == "mov" and operands[1] in registers:
                registers[first] = registers[operands[1]]
            elif mnemonic == "bl":
                target = self.symbols.get(int(first.removeprefix("#"), 16), "")
                general = general and not _FROM_FUNCTION.fullmatch(target)
                if target.startswith(_IMPL):
                    yield _Call(self._string(registers.get("x1", 0), start), general)
                    general = True

    def _instructions(self, start: int) -> Iterator[tuple[str, list[str]]]:
        end = self._starts[bisect.bisect(self._starts, start)]
        code = self._code[start - self._code_start : end - self._code_start]
        for _, _, mnemonic, operands in self._disassembler.disasm_lite(code, start):
            yield mnemonic, [part.strip() for part in operands.split(",")]

    def _string(self, address: int, function: int) -> str:
        offset = address - self._characters_start
        if not 0 <= offset < len(self._characters):
            raise StepFailed(f"{self.path}: a registration in {self.symbols[function]} has no readable name")
        return self._characters[offset : self._characters.index(b"\0", offset)].decode("ascii")
