"""Known vulnerabilities of each lock, and which of them the project accepts for how long.

pip-audit asks the service of PyPI. A package that could not be asked about is a failure: an
audit that did not happen must not look like a good one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from devtools import posargs
from kohya_mps.core import settings
from kohya_mps.core.process import capture
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.install import lockfile

from . import make


class Vulnerability(msgspec.Struct, frozen=True):
    """One known vulnerability: its identifier, its other names, and the versions without it."""

    id: str
    aliases: tuple[str, ...] = ()
    fix_versions: tuple[str, ...] = ()
    description: str = ""


class Audited(msgspec.Struct, frozen=True):
    """What the service said of one distribution; ``skip_reason`` when it said nothing."""

    name: str
    version: str = ""
    vulns: tuple[Vulnerability, ...] = ()
    skip_reason: str = ""


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vulnerability that is kept: why, what guards the user, and the last day that this counts."""

    id: str
    package: str
    version: str
    why: str
    guard: str
    until: date


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    accepted: tuple[Accepted, ...]


class _Answer(msgspec.Struct, frozen=True):
    dependencies: tuple[Audited, ...]


class Options(msgspec.Struct, frozen=True):
    """What ``nox -s audit`` was asked for."""

    names: tuple[str, ...]


class Unreachable(Exception):
    """The service did not answer, and what the auditor said."""


#: Asks about versions by distribution; raises :class:`Unreachable`.
Service = Callable[[Mapping[str, str]], tuple[Audited, ...]]


def parse_options(arguments: Sequence[str]) -> Options:
    """The options of ``nox -s audit``; without a name, every lock is meant."""
    parser = posargs.parser("audit", "Look up known vulnerabilities.")
    posargs.add_locks(parser, make.names())
    return Options(make.chosen(parser.parse_args(arguments).names))


def pip_audit(versions: Mapping[str, str]) -> tuple[Audited, ...]:
    """Ask PyPI's service through pip-audit, which has to be installed beside us."""
    with tempfile.TemporaryDirectory(prefix="kohya-mps-audit-") as scratch:
        asked = Path(scratch) / "requirements.txt"
        asked.write_text("".join(f"{n}=={v}\n" for n, v in sorted(versions.items())), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            str(asked),
            "--disable-pip",
            "--no-deps",
        ]
        done = capture([*command, "--format", "json", "--aliases", "--progress-spinner", "off"])
    try:  # its exit status is 1 for a vulnerability and for a failure alike
        return msgspec.json.decode(done.stdout, type=_Answer).dependencies
    except msgspec.DecodeError as error:
        lines = done.stderr.strip().splitlines()
        raise Unreachable(lines[-1] if lines else f"pip-audit ended with {done.returncode}") from error


def run(options: Options, service: Service = pip_audit, today: date | None = None) -> Report:
    """Audit each lock, for macOS and for Linux, and judge what is found.

    Args:
        options: which locks.
        service: who is asked.
        today: the day that acceptances are judged by; the present one, in UTC, when not given.
    """
    day = today or datetime.now(UTC).date()
    accepted = settings.read_yaml(settings.CONFIG / "audit.yaml", _File).accepted
    used: set[Accepted] = set()
    checks: list[Check] = []
    audited: dict[str, list[Audited]] = {}
    complete = True
    for name in options.names:
        lock = lockfile.read(settings.CONSTRAINTS / f"{name}.txt")
        say(f"  asking about {lock.path.name}")
        try:
            audited[name] = [each for batch in _batches(lock) for each in service(batch)]
        except Unreachable as error:
            complete = False
            checks.append(_not_audited(name, f"the service cannot be reached: {error}"))
            continue
        if skipped := [each for each in audited[name] if each.skip_reason]:
            complete = False
            some = "; ".join(each.skip_reason for each in skipped[:3])
            checks.append(_not_audited(name, f"{len(skipped)} of {len(audited[name])} packages: {some}"))
        rows = [
            _judge(name, each, vulnerability, accepted, day, used)
            for each in audited[name]
            for vulnerability in each.vulns
        ]
        if not rows and not skipped:
            rows = [Check(name, Status.PASS, f"{len(audited[name])} packages without a known vulnerability")]
        checks += rows
    if complete and set(options.names) == set(make.names()):
        checks += [_unused(entry) for entry in accepted if entry not in used]
    return Report("Known vulnerabilities", tuple(checks), {"audited": audited})


def _batches(lock: lockfile.Lock) -> list[dict[str, str]]:
    """The versions to ask about: one question, unless macOS and Linux have different ones."""
    mac, linux = lock.versions(lockfile.MAC_ARM64), lock.versions(lockfile.LINUX_X86_64)
    if all(mac.get(name, version) == version for name, version in linux.items()):
        return [mac | linux]
    return [mac, linux]


def _not_audited(name: str, why: str) -> Check:
    fix = "run it where PyPI itself can be reached: a mirror seldom has its vulnerability service"
    return Check(name, Status.FAIL, f"NOT AUDITED: {why}", fix)


def _judge(
    lock: str,
    found: Audited,
    vulnerability: Vulnerability,
    accepted: Iterable[Accepted],
    day: date,
    used: set[Accepted],
) -> Check:
    name = f"{lock}: {found.name} {found.version} {vulnerability.id}"
    names = {vulnerability.id, *vulnerability.aliases}
    entry = next(
        (e for e in accepted if e.id in names and (e.package, e.version) == (found.name, found.version)), None
    )
    if entry is None:
        fixed = ", ".join(vulnerability.fix_versions) or "no version yet"
        what = " ".join(vulnerability.description.split())[:300]
        return Check(
            name,
            Status.FAIL,
            f"{what}\nfixed in {fixed}",
            f"raise it in constraints/{lock}.in and `nox -s lock -- {lock}`, or accept it in config/audit.yaml",
        )
    used.add(entry)
    if day > entry.until:
        fix = "decide anew in config/audit.yaml: raise the package, or give a later day with the reason"
        return Check(name, Status.FAIL, f"was accepted until {entry.until}: {entry.why}", fix)
    return Check(name, Status.WARN, f"accepted until {entry.until}: {entry.why}\nguard: {entry.guard}")


def _unused(entry: Accepted) -> Check:
    name = f"config/audit.yaml: {entry.id}"
    return Check(
        name, Status.WARN, f"no lock has it any more ({entry.package} {entry.version})", "remove the entry"
    )


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, run)
