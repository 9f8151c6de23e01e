"""``nox -s cross_check``: prove, on any machine, that a Mac could load what a lock installs.

uv installs the macOS arm64 wheels of a lock for real; then every native library and every
distribution's metadata is read. Nothing is run: that a Mac *does* load it is *predicted*.
"""

from __future__ import annotations

import mmap
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from devtools import posargs
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.process import capture, clean_environ, uv
from kohya_mps.core.report import Check, Report, say
from kohya_mps.core.text import join_some
from kohya_mps.install import lockfile, package_index

from . import dependency_chain, in_file, macho, resolve
from .in_file import PYTHON

#: The releases of macOS for Apple Silicon. Wheels are chosen by them: a Mac with a newer one
#: may get another wheel of the same version (numpy has one for 14.0 and one for 11.0).
MACOS = ("11.0", "12.0", "13.0", "14.0", "15.0", "26.0")


class CrossCheckOptions(msgspec.Struct, frozen=True):
    """Which locks are checked."""

    names: tuple[str, ...]


class Found(msgspec.Struct, frozen=True):
    """What an installed tree contains, and everything in it that a Mac would refuse.

    ``lowest_macos`` is the highest minimum that a native library states, and ``stated_by`` names
    that library. ``mps_macos`` is what torch's MPS backend says that it needs, if torch is there.
    ``links`` counts what the native libraries link to, by where it is found.
    """

    distributions: int
    libraries: int
    links: Mapping[str, int]
    unloadable: tuple[str, ...]
    unresolved: tuple[str, ...]
    lowest_macos: macho.Version
    stated_by: str
    mps_macos: macho.Version
    unmet: tuple[str, ...]
    forbidden: tuple[str, ...]
    licences: Mapping[str, tuple[str, ...]]


class Proof(msgspec.Struct, frozen=True):
    """One lock on one release of macOS."""

    lock: str
    macos: str
    found: Found


def parse_options(arguments: Sequence[str]) -> CrossCheckOptions:
    """The options of ``nox -s cross_check``; without a name, every lock is checked."""
    parser = posargs.parser("cross_check", "Prove that a Mac could load the locks.")
    posargs.add_locks(parser, in_file.lock_names())
    return CrossCheckOptions(in_file.select(parser.parse_args(arguments).names))


def run(options: CrossCheckOptions) -> Report:
    """Install and examine each lock for the lowest macOS that takes it, and for the newest."""
    scratch = settings.ROOT / ".nox"
    scratch.mkdir(exist_ok=True)
    proofs: list[Proof] = []
    checks: list[Check] = []
    for name in options.names:
        lock = lockfile.read(settings.CONSTRAINTS / f"{name}.txt")
        with tempfile.TemporaryDirectory(prefix="cross-check-", dir=scratch) as directory:
            proven = [
                Proof(name, macos, examine(tree, lock))
                for macos, tree in _install_lowest_and_newest(lock, Path(directory))
            ]
        proofs += proven
        checks += [check for proof in proven for check in judge(proof)]
        checks.append(lowest_macos(proven[0]))
    return Report("macOS arm64 environments", tuple(checks), {"proofs": proofs}, _licences(proofs))


def _install_lowest_and_newest(lock: lockfile.Lock, directory: Path) -> list[tuple[str, Path]]:
    lowest, tree = install_lowest(lock, directory)
    if lowest == MACOS[-1]:
        return [(lowest, tree)]
    newest = directory / MACOS[-1]
    if reason := install(lock, newest, MACOS[-1]):
        raise StepFailed(f"{lock.path.name} installs on macOS {lowest} but not on {MACOS[-1]}:\n{reason}")
    return [(lowest, tree), (MACOS[-1], newest)]


def install_lowest(lock: lockfile.Lock, directory: Path) -> tuple[str, Path]:
    """Install a lock for the lowest macOS that has a wheel for every pin.

    Raises:
        StepFailed: there is none, or uv failed for another reason.
    """
    reason = ""
    for macos in MACOS:
        say(f"  {lock.path.name}: installing for macOS {macos}")
        if not (reason := install(lock, directory / macos, macos)):
            return macos, directory / macos
        if not resolve.has_no_fitting_wheel(reason):
            break
    because = resolve.culprit_chain(reason) or "uv cannot install it"
    raise StepFailed(
        f"{lock.path.name} cannot be installed on Apple Silicon: {because}\n{reason}",
        f"`nox -s lock_check` shows whether the lock was edited; `nox -s lock -- {lock.path.stem}` makes it again",
    )


def install(lock: lockfile.Lock, tree: Path, macos: str) -> str:
    """Install the macOS arm64 wheels of a lock into a directory, digests checked.

    What the distributions require of each other is judged afterwards, overrides included.

    Returns:
        uv's reason why it could not; empty when it did.
    """
    command = [uv(), "pip", "install", "--quiet", *resolve.FOR_A_MAC]
    command += ["--python-version", PYTHON, "--only-binary", ":all:", "--require-hashes", "--no-deps"]
    environ = clean_environ(extra={**package_index.for_uv(), "MACOSX_DEPLOYMENT_TARGET": macos})
    done = capture([*command, "--target", tree, "-r", lock.path], cwd=settings.ROOT, env=environ)
    return "" if done.returncode == 0 else done.stderr.strip() or f"uv ended with {done.returncode}"


def examine(tree: Path, lock: lockfile.Lock) -> Found:
    """Read every native library and every distribution of an installed tree."""
    installed = metadata.distributions(path=[str(tree)])
    distributions: dict[str, metadata.Distribution] = {str(canonicalize_name(d.name)): d for d in installed}
    required = in_file.requirements(lock.path.stem)
    requirements = _Requirements(distributions, in_file.overrides(lock.path.stem))
    requirements.follow_all(required)
    owners = {
        Path(str(distribution.locate_file(file))): name
        for name, distribution in distributions.items()
        for file in distribution.files or ()
    }
    images, unloadable, count = _images(tree)
    links, unresolved = _links(images, tree, owners, requirements.needs)
    newest = max(images, key=lambda image: image.macos, default=None)
    roots = [canonicalize_name(requirement.name) for requirement in required]
    return Found(
        distributions=len(distributions),
        libraries=count,
        links=links,
        unloadable=tuple(unloadable),
        unresolved=tuple(unresolved),
        lowest_macos=newest.macos if newest else (),
        stated_by=str(newest.path.relative_to(tree)) if newest else "",
        mps_macos=_mps_needs(tree),
        unmet=tuple(requirements.unmet),
        forbidden=tuple(
            f"{dependency_chain.chain(requirements.needs, roots, name)}, and {name} {reason}"
            for name, reason in dependency_chain.forbidden(distributions, distributions)
        ),
        licences=_by_licence(distributions),
    )


def judge(proof: Proof) -> list[Check]:
    """The report's rows for one lock on one release of macOS."""
    found = proof.found
    links = ", ".join(f"{count} {where}" for where, count in found.links.items())
    rows = (
        ("native libraries", found.unloadable, f"{found.libraries} are Mach-O with an arm64 slice"),
        ("linked libraries", found.unresolved, f"{links}; none missing"),
        (
            "requirements",
            found.unmet,
            f"met for {found.distributions} distributions on darwin, arm64, {PYTHON}",
        ),
        ("forbidden packages", found.forbidden, "none"),
    )
    fix = f"change constraints/{proof.lock}.in, then `nox -s lock -- {proof.lock}`"
    return [
        Check.of(
            f"{proof.lock} on macOS {proof.macos}: {what}", not wrong, join_some(wrong, 10, "\n") or good, fix
        )
        for what, wrong, good in rows
    ]


def lowest_macos(proof: Proof) -> Check:
    """The lowest macOS that a lock works on, compared with what the profiles of this lock say.

    ``proof`` is that of the lowest macOS with a wheel for every pin. A library may state a
    higher one than its wheel does: the wheel then installs, and does not load. And torch
    may load where its MPS backend says no.
    """
    found = proof.found
    needed = {
        "its wheels are tagged for it": tuple(int(part) for part in proof.macos.split(".")),
        f"{found.stated_by} states it": found.lowest_macos,
        "torch's MPS backend needs it": found.mps_macos,
    }
    measured = max(_release(version) for version in needed.values())
    why = ", ".join(reason for reason, version in needed.items() if _release(version) == measured)
    text = ".".join(map(str, measured))
    wrong = []
    for profile_name in settings.profile_names():
        profile = settings.load_profile(profile_name)
        if proof.lock in (profile.lock, profile.gui_lock) and profile.macos != text:
            wrong.append(f"config/profiles/{profile_name}.yaml says {profile.macos}")
    detail = "; ".join([f"{text} ({why})", *wrong])
    return Check.of(f"{proof.lock}: lowest macOS", not wrong, detail, f'write macos: "{text}" there')


def _release(version: macho.Version) -> macho.Version:
    return (*version, 0, 0)[:2]


def _mps_needs(tree: Path) -> macho.Version:
    """The macOS that torch's MPS backend names when it refuses an older one (ATen/mps/MPSDevice.h)."""
    library = tree / "torch" / "lib" / "libtorch_cpu.dylib"
    if not library.is_file():
        return ()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"MPS backend is supported on [mM]acOS (\d+)\.(\d+)\+", content)
        return (int(found[1]), int(found[2])) if found else ()


def _images(tree: Path) -> tuple[list[macho.Image], list[str], int]:
    images, unloadable, count = [], [], 0
    for path in macho.candidates(tree):
        count += 1
        try:
            image = macho.read(path)
        except macho.Unloadable as error:
            unloadable.append(f"{path.relative_to(tree)} {error}")
            continue
        if image is not None:
            images.append(image)
            if not image.macos:
                unloadable.append(f"{path.relative_to(tree)} does not say which macOS it runs on")
    return images, unloadable, count


def _links(
    images: list[macho.Image], tree: Path, owners: Mapping[Path, str], needs: Mapping[str, set[str]]
) -> tuple[dict[str, int], list[str]]:
    """How many links are found where, and those that are not found at all."""
    exported: dict[str, set[str]] = {}
    for image in images:
        exported.setdefault(owners.get(image.path, ""), set()).add(image.install_name)
    counts: Counter[str] = Counter()
    unresolved = []
    for image in images:
        owner = owners.get(image.path, "")
        # dyld takes a library that is already loaded for a link to its install name. torchvision
        # relies on that: it imports torch first, and its own search paths are the build machine's.
        loaded = {name for needed in _all_needs(owner, needs) - {owner} for name in exported.get(needed, ())}
        for link in image.links:
            found_in = macho.locate(image, link, tree)
            if found_in is not macho.FoundIn.NOWHERE:
                counts[found_in.value] += 1
            elif link.name in loaded:
                counts["loaded before by a package that is required"] += 1
            elif link.weak:
                counts["weak and missing, which dyld allows"] += 1
            else:
                searched = ", ".join(map(str, macho.search(image, link))) or "no path: it has no LC_RPATH"
                unresolved.append(
                    f"{image.path.relative_to(tree)} links to {link.name}, looked for in {searched}"
                )
    return dict(counts), unresolved


def _all_needs(name: str, needs: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set[str](), [name]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += needs.get(each, ())
    return found


class _Requirements:
    """Follows what each distribution requires on darwin, arm64 and this Python.

    An extra counts once something requires it: its requirements are then followed too. An
    override replaces what a distribution requires.

    ``needs`` has the packages that each distribution requires; the keys of ``unmet`` say which
    requirements are not met.
    """

    def __init__(
        self, distributions: Mapping[str, metadata.Distribution], overrides: Iterable[Requirement]
    ) -> None:
        self.needs: dict[str, set[str]] = {}
        self.unmet: dict[str, None] = {}
        self._distributions = distributions
        self._overrides: dict[str, Requirement] = {canonicalize_name(each.name): each for each in overrides}
        self._extras: dict[str, set[str]] = {name: set() for name in distributions}
        self._waiting = list(distributions)

    def follow_all(self, required: Iterable[Requirement]) -> None:
        """Follow what the ``.in`` file requires, and then each distribution."""
        for requirement in required:
            if _applies(requirement, ()):
                self._follow("the .in", requirement)
        while self._waiting:
            name = self._waiting.pop()
            distribution = self._distributions[name]
            python = distribution.metadata["Requires-Python"]
            if python and not SpecifierSet(python).contains(lockfile.MAC_ARM64["python_full_version"]):
                self.unmet[f"{name} needs Python {python}, which is {PYTHON}"] = None
            for line in distribution.requires or ():
                requirement = Requirement(line)
                if _applies(requirement, self._extras[name]):
                    self._follow(name, requirement)

    def _follow(self, who: str, requirement: Requirement) -> None:
        name = canonicalize_name(requirement.name)
        distribution = self._distributions.get(name)
        requirement = self._overrides.get(name, requirement)
        need = f"{who} needs {requirement.name}{requirement.specifier}"
        if distribution is None:
            self.unmet[f"{need}, which is missing"] = None
        elif not requirement.specifier.contains(distribution.version, prereleases=True):
            self.unmet[f"{need}, which is {distribution.version}"] = None
        elif not requirement.extras <= self._extras[name]:
            self._extras[name] |= requirement.extras
            self._waiting.append(name)
        self.needs.setdefault(who, set()).add(name)


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**lockfile.MAC_ARM64, "extra": extra}) for extra in ("", *extras)
    )


def _by_licence(distributions: Mapping[str, metadata.Distribution]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for name, distribution in sorted(distributions.items()):
        found.setdefault(licence(distribution), []).append(name)
    return {text: tuple(names) for text, names in sorted(found.items())}


def licence(distribution: metadata.Distribution) -> str:
    """The licence in a distribution's metadata: expression, else classifier, else the first line of the text."""
    data = distribution.metadata
    if expression := data["License-Expression"]:
        return expression
    classified = [c.split(" :: ")[-1] for c in data.get_all("Classifier", []) if c.startswith("License :: ")]
    if classified:
        return ", ".join(sorted(classified))
    lines = (data["License"] or "").strip().splitlines()
    return lines[0].strip() if lines else "not stated"


def _licences(proofs: Iterable[Proof]) -> tuple[str, ...]:
    merged: dict[str, set[str]] = {}
    for proof in proofs:
        for text, names in proof.found.licences.items():
            merged.setdefault(text, set()).update(names)
    lines = [f"  {text}: {', '.join(sorted(names))}" for text, names in sorted(merged.items())]
    return ("Nothing of this ran on a Mac: that it loads there is predicted.", "Licences:", *lines)


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, run)
