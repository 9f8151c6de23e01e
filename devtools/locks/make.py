"""``nox -s lock``: make ``constraints/NAME.txt`` from ``NAME.in`` with uv."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.files import write_atomic
from kohya_mps.core.process import clean_environ
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.install import lockfile

from . import dependency_chain, header, in_file, resolve


class LockOptions(msgspec.Struct, frozen=True):
    """Which locks are made, whether they take newer versions, and their cutoff (YYYY-MM-DD)."""

    names: tuple[str, ...]
    upgrade: bool
    cutoff: str | None


def parse_options(arguments: Sequence[str]) -> LockOptions:
    """The options of ``nox -s lock``; without a name, every lock is made."""
    parser = posargs.parser("lock", "Make the locks from their .in files.")
    posargs.add_locks(parser, in_file.lock_names())
    parser.add_argument("--profile", choices=settings.profile_names(), help="the locks of this profile")
    parser.add_argument(
        "--upgrade", action="store_true", help="take newer versions where the .in allows them"
    )
    parser.add_argument("--cutoff", metavar="DATE", help="ignore later releases; written into the .in")
    parsed = parser.parse_args(arguments)
    requested = list(parsed.names)
    if parsed.profile:
        profile = settings.load_profile(parsed.profile, "--profile")
        requested += [profile.lock, profile.gui_lock]
    return LockOptions(in_file.select(requested), parsed.upgrade, parsed.cutoff)


def make_all(options: LockOptions) -> Report:
    """Make the selected locks; the report says which versions changed."""
    checks = []
    for name in options.names:
        _, lock = in_file.paths(name)
        before = _versions(lock)
        make(name, upgrade=options.upgrade, cutoff=options.cutoff)
        after = _versions(lock)
        changed = [
            f"{package} {before.get(package, '(new)')} -> {after.get(package, '(gone)')}"
            for package in sorted(before.keys() | after.keys())
            if before.get(package) != after.get(package)
        ]
        detail = "; ".join(changed) if before else "a new lock"
        checks.append(
            Check(lock.name, Status.PASS, f"{len(after)} packages; {detail or 'no version changed'}")
        )
    return Report("Locks", tuple(checks))


def make(name: str, *, upgrade: bool = False, cutoff: str | None = None) -> Path:
    """Make ``NAME.txt`` from ``NAME.in`` with uv: universal, hashed, wheels only.

    Both files change together, and only once the new lock has been found good for a Mac.

    Args:
        name: the lock.
        upgrade: take newer versions than the present lock has, where ``NAME.in`` allows.
        cutoff: ignore releases after this day (YYYY-MM-DD); written into ``NAME.in``.

    Returns:
        The lock. Its packages come from the configured index; no address is written into it.

    Raises:
        UsageError: ``NAME.in`` or the cutoff is invalid.
        StepFailed: no lock for Apple Silicon can be made, with the chain of packages that
            leads to the culprit and the resolver's own words.
    """
    source, target = in_file.paths(name)
    text = in_file.read(source)
    in_file.cutoff_of(source, text)
    if cutoff:
        text = in_file.with_cutoff(text, cutoff)
    say(f"  resolving {source.name}")
    pins = _resolve_pins(source, text, target, upgrade=upgrade)
    if cutoff:
        write_atomic(source, text.encode())
    write_atomic(target, header.write(name, in_file.PYTHON, in_file.inputs(source), pins).encode())
    return target


def _resolve_pins(source: Path, text: str, target: Path, *, upgrade: bool) -> str:
    """The pins of a new lock, as uv writes them, once they are found good for a Mac."""
    with tempfile.TemporaryDirectory(prefix="kohya-mps-lock-") as scratch:
        draft = Path(scratch) / target.name
        if target.exists():
            draft.write_bytes(target.read_bytes())  # uv keeps what is pinned there where it can
        arguments = ["--output-file", str(draft), "--universal", "--generate-hashes"]
        arguments += ["--custom-compile-command", f"nox -s lock -- {source.stem}"]
        _compile(source, text, [*arguments, *(["--upgrade"] if upgrade else [])])
        _refuse_forbidden(source, draft)
        _refuse_without_mac_wheel(source, text, draft)
        lockfile.read(draft)
        pins = re.sub(r"\A(#.*\n)+", "", draft.read_text(encoding="utf-8"))
        # uv names the temporary file with the overrides, which is another one each time.
        return re.sub(r"--override \S+", f"# override: in {source.name}", pins)


def _compile(source: Path, text: str, arguments: list[str], extra: Mapping[str, str] | None = None) -> None:
    environ = clean_environ(extra=extra)
    environ.pop("UV_FIND_LINKS", None)  # a local wheel's hash is not the published one's
    with tempfile.NamedTemporaryFile("w", prefix="kohya-mps-override-", suffix=".txt") as overriding:
        overriding.write("\n".join(in_file.override_lines(text)))
        overriding.flush()
        own = [source.name, "--exclude-newer", in_file.cutoff_of(source, text), "--override", overriding.name]
        reason = resolve.resolve([*own, *arguments], cwd=source.parent, env=environ).reason
    if reason:
        because = resolve.culprit_chain(reason)
        raise StepFailed(
            f"{source.name}: no lock for Apple Silicon can be made from it"
            + (f": {because}" if because else "")
            + "\n"
            + "\n".join(f"    {line}" for line in reason.splitlines()),
            f"change that line of {source}, then `nox -s lock -- {source.stem}`",
        )


def _refuse_without_mac_wheel(source: Path, text: str, draft: Path) -> None:
    """A universal lock may hold what exists for Linux alone: resolve it once more, for a Mac."""
    arguments = [*resolve.FOR_A_MAC, "--constraint", str(draft)]
    _compile(source, text, arguments, {"MACOSX_DEPLOYMENT_TARGET": resolve.ANY_MACOS})


def _refuse_forbidden(source: Path, draft: Path) -> None:
    if found := dependency_chain.forbidden_in_lock(lockfile.read(draft)):
        name, why = found[0]
        raise StepFailed(
            f"{source.name}: {why}",
            f"leave the first of them out of {source}, or choose a version that does not need {name}",
        )


def _versions(lock: Path) -> dict[str, str]:
    """The versions of a lock by package; several where they differ by marker."""
    found: dict[str, set[str]] = {}
    for pin in lockfile.read(lock).pins if lock.exists() else ():
        found.setdefault(pin.name, set()).add(pin.version)
    return {name: " and ".join(sorted(versions)) for name, versions in found.items()}
