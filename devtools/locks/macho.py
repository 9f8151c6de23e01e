"""What a native library requires of the Mac that loads it, read from its load commands with LIEF."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import lief
import msgspec

lief.logging.disable()  # it returns None for what it cannot read, and we report that

#: The first bytes of a Mach-O file, thin or fat, in either byte order.
_MAGIC = {
    bytes.fromhex(digits)
    for digits in (
        "cffaedfe",
        "cefaedfe",
        "feedfacf",
        "feedface",
        "cafebabe",
        "cafebabf",
        "bebafeca",
        "bfbafeca",
    )
}

# Apple's arm64e has pointer authentication; a plain arm64 process, as Python is, cannot load it.
_ARM64E = 2
_SUBTYPE = 0x00FFFFFF

_LOADED = {
    lief.MachO.Header.FILE_TYPE.EXECUTE,
    lief.MachO.Header.FILE_TYPE.DYLIB,
    lief.MachO.Header.FILE_TYPE.BUNDLE,
}

Version = tuple[int, ...]


class Link(msgspec.Struct, frozen=True):
    """A library that another one names; a weak one may be missing (``man dyld``)."""

    name: str
    weak: bool


class Image(msgspec.Struct, frozen=True):
    """The arm64 slice of one file: its path, and what dyld needs to know to load it.

    ``install_name`` is what others link to it by, ``macos`` the lowest version that it says
    it runs on (LC_BUILD_VERSION or LC_VERSION_MIN_MACOSX); empty when it does not say.
    """

    path: Path
    install_name: str
    links: tuple[Link, ...]
    rpaths: tuple[str, ...]
    macos: Version


class Unloadable(Exception):
    """A file that an Apple Silicon Mac cannot load; the message says why."""


def candidates(tree: Path) -> Iterator[Path]:
    """Every file of a tree that is Mach-O, or by its name should be."""
    for path in sorted(tree.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                magic = file.read(4)
            if magic in _MAGIC or path.suffix in (".so", ".dylib"):
                yield path


def read(path: Path) -> Image | None:
    """Read the arm64 slice of a file; None for a file that is linked, not loaded, such as ``.o``.

    Raises:
        Unloadable: it is not Mach-O, or has no slice for Apple Silicon and macOS.
    """
    fat = lief.MachO.parse(str(path), lief.MachO.ParserConfig.quick)
    if fat is None:
        raise Unloadable("is not Mach-O")
    slices = list(fat)
    kinds = ", ".join(each.header.cpu_type.name.lower() for each in slices)
    for binary in slices:
        header = binary.header
        if header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64 and header.cpu_subtype & _SUBTYPE != _ARM64E:
            return _image(path, binary) if header.file_type in _LOADED else None
    raise Unloadable(f"has no arm64 slice, only {kinds or 'an empty list'}")


def _image(path: Path, binary: lief.MachO.Binary) -> Image:
    own, links = "", []
    for library in binary.libraries:
        if library.command == lief.MachO.LoadCommand.TYPE.ID_DYLIB:
            own = str(library.name)
        else:
            weak = library.command == lief.MachO.LoadCommand.TYPE.LOAD_WEAK_DYLIB
            links.append(Link(str(library.name), weak))
    return Image(path, own, tuple(links), tuple(str(entry.path) for entry in binary.rpaths), _macos(binary))


def _macos(binary: lief.MachO.Binary) -> Version:
    if (build := binary.build_version) is not None:
        if build.platform != lief.MachO.BuildVersion.PLATFORMS.MACOS:
            raise Unloadable(f"was built for {build.platform.name}, not macOS")
        return tuple(build.minos)
    if (minimum := binary.version_min) is not None:
        return tuple(minimum.version)
    return ()


class FoundIn(Enum):
    """Where dyld finds a library that another one links to."""

    MACOS = "part of macOS"
    TREE = "in the installed packages"
    NOWHERE = "not found by its path"


def locate(image: Image, link: Link, tree: Path) -> FoundIn:
    """Where dyld would find a link of an image, going by paths alone.

    macOS keeps its own libraries in a cache without files, so what lies in the two directories
    that are Apple's alone (``/usr/lib``, ``/System/Library``) is taken to be there.
    """
    if link.name.startswith(("/usr/lib/", "/System/Library/")):
        return FoundIn.MACOS
    inside = tree.resolve()
    found = any(path.is_file() and path.resolve().is_relative_to(inside) for path in search(image, link))
    return FoundIn.TREE if found else FoundIn.NOWHERE


def search(image: Image, link: Link) -> list[Path]:
    """The files that dyld tries for a link, in its order (``man dyld``: LC_RPATH, @loader_path)."""
    here = image.path.parent
    head, _, rest = link.name.partition("/")
    if head == "@rpath":
        return [_expand(rpath, here) / rest for rpath in image.rpaths]
    return [_expand(link.name, here)]


def _expand(name: str, here: Path) -> Path:
    head, _, rest = name.partition("/")
    return here / rest if head == "@loader_path" else Path(name)
