"""The operator data, read from the macOS wheel of a lock's torch.

There are three sources, all in the wheel. ``native_functions.yaml``, as torch's own generator
reads it, says which operators have MPS kernels. ``torch/backends/mps/__init__.py`` registers
some from Python. The library has the list of those that always run on the CPU. What the library
registers must also agree with the first source; otherwise no data is written.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.process import capture, clean_environ, stream, uv
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import Profile, load_profile, profile_names
from kohya_mps.install import lockfile, package_index

from . import binary, operators
from .mps_messages import Text
from .operators import Operators

_READER = Path(__file__).with_name("native_functions.py")
# uv assumes macOS 13. Newer wheels require a newer one, and nothing is run here.
_MACOS = "15.0"


def parse_options(arguments: Sequence[str]) -> list[str]:
    """The profiles behind ``nox -s rehearse_data --``."""
    parser = posargs.parser("rehearse_data", "Make the rehearsals' operator data from the macOS wheels.")
    parser.add_argument("names", nargs="*", metavar="PROFILE", help="all of them if left out")
    return list(parser.parse_args(arguments).names)


def make(names: list[str]) -> Report:
    """Write the data file of each profile's torch; of every profile when none is named.

    Raises:
        StepFailed: the wheel cannot be downloaded, or its sources contradict each other.
    """
    checks = []
    for name in names or profile_names():
        profile = load_profile(name)
        say(f"  {name}: unpacking torch's macOS wheel")
        with tempfile.TemporaryDirectory() as directory:
            wheel = Path(directory)
            unpack(profile, wheel)
            found = read(wheel)
        path = operators.path_for(found.torch)
        if path.exists() and _same(operators.load(found.torch), found):
            checks.append(Check(path.name, Status.PASS, "is what the wheel says"))
            continue
        write_atomic(path, operators.dump(found).encode())
        checks.append(Check(path.name, Status.PASS, f"written: {len(found.kernels)} overloads with a kernel"))
    return Report("Operator data", tuple(checks), {"files": [check.name for check in checks]})


def unpack(profile: Profile, target: Path) -> None:
    """Put the content of the torch wheel that a Mac with this profile installs into ``target``.

    Raises:
        UsageError: the lock has no torch.
        StepFailed: it cannot be downloaded, or its digest is not the lock's.
    """
    lock = lockfile.read(profile.lock_file)
    pin = next((p for p in lock.pins if p.name == "torch" and p.applies(lockfile.MAC_ARM64)), None)
    if pin is None:
        raise UsageError(f"{profile.lock_file}: has no torch for macOS", "choose another profile")
    hashes = " ".join(f"--hash={digest}" for digest in pin.hashes)
    requirements = target / "requirements.txt"
    requirements.write_text(f"{pin.name}=={pin.version} {hashes}\n", encoding="utf-8")
    command = [uv(), "pip", "install", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--python-platform", "aarch64-apple-darwin", "--python-version", profile.python]
    environ = clean_environ(extra={**package_index.for_uv(), "MACOSX_DEPLOYMENT_TARGET": _MACOS})
    finished = stream([*command, "--target", target, "-r", requirements], env=environ)
    if finished.returncode:
        raise StepFailed(f"torch {pin.version}'s macOS wheel cannot be downloaded: uv's reason is above")


def read(wheel: Path) -> Operators:
    """The operators that an unpacked wheel registers for MPS.

    Raises:
        StepFailed: the generator's reading and the library's registrations differ.
    """
    library = wheel / "torch" / "lib" / "libtorch_cpu.dylib"
    info = next(wheel.glob("torch-*.dist-info"))
    predicted = frozenset(kernels(wheel))
    registered = binary.read(library)
    if predicted != registered.kernels:
        raise StepFailed(
            f"{info.name}: native_functions.yaml and the library differ in what MPS has kernels for: "
            f"{', '.join(sorted(predicted ^ registered.kernels))}",
            "find out which of them a Mac follows before rehearsing with this torch",
        )
    content = library.read_bytes()
    return Operators(
        torch=info.name.removeprefix("torch-").removesuffix(".dist-info"),
        made=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        wheel=(_tag(info / "WHEEL"), hashlib.sha256(content).hexdigest()),
        kernels=predicted,
        fallback=registered.fallback,
        refused=registered.refused,
        python=from_python(wheel / "torch" / "backends" / "mps" / "__init__.py"),
        texts=frozenset(text.value for text in Text if text.value.encode() in content),
    )


def kernels(wheel: Path) -> list[str]:
    """The overloads with MPS kernels, as the wheel's own ``torchgen`` reads its operator list."""
    done = capture([sys.executable, _READER, wheel])
    if done.returncode:
        raise StepFailed(f"torchgen cannot read {wheel}: {done.stderr.strip()}")
    return msgspec.json.decode(done.stdout, type=list[str])


def from_python(source: Path) -> dict[str, str]:
    """What a module registers with ``Library.impl(NAME, FUNCTION, "MPS")``, as ``module:function``."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name: f"{_absolute(node)}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return {name: imported[function] for name, function in _registrations(tree)}


def _registrations(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="impl"),
                args=[ast.Constant(value=str(name)), ast.Name(id=function), ast.Constant(value="MPS")],
            ):
                yield name, function


def _absolute(node: ast.ImportFrom) -> str:
    parents = ["torch", "backends", "mps"][: 4 - node.level] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def _tag(wheel_file: Path) -> str:
    lines = wheel_file.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("Tag: ") for line in lines if line.startswith("Tag: "))


def _same(one: Operators, other: Operators) -> bool:
    """Whether two files have the same content, except for the day they were made."""
    return operators.dump(one).replace(one.made, "") == operators.dump(other).replace(other.made, "")


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, make)
