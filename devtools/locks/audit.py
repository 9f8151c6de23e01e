"""``nox -s audit``: known vulnerabilities of each lock, and which ones the project accepts until when.

pip-audit asks PyPI's service. A package that could not be looked up is a failure: an audit
that did not happen must not look like a good one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path

import msgspec

from devtools import posargs
from kohya_mps.core import settings
from kohya_mps.core.process import capture
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.install import lockfile

from . import in_file


class Vulnerability(msgspec.Struct, frozen=True):
    """One known vulnerability: its identifier, its other names, and the versions without it."""

    id: str
    aliases: tuple[str, ...] = ()
    fix_versions: tuple[str, ...] = ()
    description: str = ""


class Audited(msgspec.Struct, frozen=True):
    """What the service knows of one package; ``skip_reason`` says why it knows nothing."""

    name: str
    version: str = ""
    vulns: tuple[Vulnerability, ...] = ()
    skip_reason: str = ""


class Accepted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A vulnerability that the project accepts: why, what guards the user, and the last day of it."""

    id: str
    package: str
    version: str
    why: str
    guard: str
    until: date

    def accepts(self, package: Audited, vulnerability: Vulnerability) -> bool:
        """Whether this entry is about that vulnerability, by any of its names, in that version."""
        same = (self.package, self.version) == (package.name, package.version)
        return same and self.id in (vulnerability.id, *vulnerability.aliases)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    accepted: tuple[Accepted, ...]


class _Answer(msgspec.Struct, frozen=True):
    dependencies: tuple[Audited, ...]


class AuditOptions(msgspec.Struct, frozen=True):
    """Which locks are audited."""

    names: tuple[str, ...]


class _Audit(msgspec.Struct, frozen=True):
    """What the service answered for one lock; ``error`` when it could not be reached."""

    lock: str
    packages: tuple[Audited, ...]
    error: str = ""

    @property
    def skipped(self) -> list[Audited]:
        """The packages about which the service said nothing."""
        return [package for package in self.packages if package.skip_reason]

    @property
    def complete(self) -> bool:
        """Whether every package was looked up."""
        return not self.error and not self.skipped

    def matches(
        self, accepted: Iterable[Accepted]
    ) -> list[tuple[tuple[Audited, Vulnerability], Accepted | None]]:
        """Each vulnerability of each package, with the entry that accepts it."""
        entries = tuple(accepted)
        return [
            ((package, vulnerability), next((e for e in entries if e.accepts(package, vulnerability)), None))
            for package in self.packages
            for vulnerability in package.vulns
        ]


class Unreachable(Exception):
    """The service did not answer; the message is the auditor's."""


#: Looks up versions by package name; raises :class:`Unreachable`.
Service = Callable[[Mapping[str, str]], tuple[Audited, ...]]


def parse_options(arguments: Sequence[str]) -> AuditOptions:
    """The options of ``nox -s audit``; without a name, every lock is audited."""
    parser = posargs.parser("audit", "Look up known vulnerabilities.")
    posargs.add_locks(parser, in_file.lock_names())
    return AuditOptions(in_file.select(parser.parse_args(arguments).names))


def pip_audit(versions: Mapping[str, str]) -> tuple[Audited, ...]:
    """Ask PyPI's service through pip-audit, which has to be installed in this environment."""
    with tempfile.TemporaryDirectory(prefix="kohya-mps-audit-") as scratch:
        path = Path(scratch) / "requirements.txt"
        path.write_text("".join(f"{n}=={v}\n" for n, v in sorted(versions.items())), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            str(path),
            "--disable-pip",
            "--no-deps",
        ]
        done = capture([*command, "--format", "json", "--aliases", "--progress-spinner", "off"])
    try:  # its exit status is 1 for a vulnerability and for a failure alike
        return msgspec.json.decode(done.stdout, type=_Answer).dependencies
    except msgspec.DecodeError as error:
        lines = done.stderr.strip().splitlines()
        raise Unreachable(lines[-1] if lines else f"pip-audit ended with {done.returncode}") from error


def run(options: AuditOptions, service: Service = pip_audit, today: date | None = None) -> Report:
    """Audit each lock, for macOS and for Linux, and judge what is found.

    Args:
        options: which locks.
        service: looks up the vulnerabilities.
        today: the day for which acceptances are judged; None is the present day in UTC.
    """
    day = today or datetime.now(UTC).date()
    accepted = settings.read_yaml(settings.CONFIG / "audit.yaml", _File).accepted
    audits = [_audit(name, service) for name in options.names]
    checks = [check for audit in audits for check in _judge(audit, accepted, day)]
    if all(audit.complete for audit in audits) and set(options.names) == set(in_file.lock_names()):
        used = {entry for audit in audits for _, entry in audit.matches(accepted)}
        checks += [_unused(entry) for entry in accepted if entry not in used]
    found = {audit.lock: audit.packages for audit in audits if not audit.error}
    return Report("Known vulnerabilities", tuple(checks), {"audited": found})


def _audit(name: str, service: Service) -> _Audit:
    lock = lockfile.read(settings.CONSTRAINTS / f"{name}.txt")
    say(f"  looking up the packages of {lock.path.name}")
    try:
        return _Audit(name, tuple(package for batch in _batches(lock) for package in service(batch)))
    except Unreachable as error:
        return _Audit(name, (), f"the service cannot be reached: {error}")


def _judge(audit: _Audit, accepted: Iterable[Accepted], day: date) -> Iterator[Check]:
    """The rows of one lock: what was not audited, then each vulnerability."""
    fix = "run it where PyPI itself can be reached: a mirror seldom has its vulnerability service"
    if audit.error:
        yield Check(audit.lock, Status.FAIL, f"NOT AUDITED: {audit.error}", fix)
        return
    if audit.skipped:
        some = "; ".join(package.skip_reason for package in audit.skipped[:3])
        detail = f"NOT AUDITED: {len(audit.skipped)} of {len(audit.packages)} packages: {some}"
        yield Check(audit.lock, Status.FAIL, detail, fix)
    matches = audit.matches(accepted)
    for (package, vulnerability), entry in matches:
        yield _judge_vulnerability(audit.lock, package, vulnerability, entry, day)
    if not matches and not audit.skipped:
        detail = f"{len(audit.packages)} packages without a known vulnerability"
        yield Check(audit.lock, Status.PASS, detail)


def _batches(lock: lockfile.Lock) -> list[dict[str, str]]:
    """The versions to look up: all at once, unless macOS and Linux have different ones."""
    mac, linux = lock.versions(lockfile.MAC_ARM64), lock.versions(lockfile.LINUX_X86_64)
    if all(mac.get(name, version) == version for name, version in linux.items()):
        return [mac | linux]
    return [mac, linux]


def _judge_vulnerability(
    lock: str, package: Audited, vulnerability: Vulnerability, entry: Accepted | None, day: date
) -> Check:
    name = f"{lock}: {package.name} {package.version} {vulnerability.id}"
    if entry is None:
        fixed = ", ".join(vulnerability.fix_versions) or "no version yet"
        description = " ".join(vulnerability.description.split())[:300]
        return Check(
            name,
            Status.FAIL,
            f"{description}\nfixed in {fixed}",
            f"raise it in constraints/{lock}.in and `nox -s lock -- {lock}`, or accept it in config/audit.yaml",
        )
    if day > entry.until:
        fix = "decide anew in config/audit.yaml: raise the package, or set a later day with the reason"
        return Check(name, Status.FAIL, f"was accepted until {entry.until}: {entry.why}", fix)
    return Check(name, Status.WARN, f"accepted until {entry.until}: {entry.why}\nguard: {entry.guard}")


def _unused(entry: Accepted) -> Check:
    name = f"config/audit.yaml: {entry.id}"
    return Check(
        name, Status.WARN, f"no lock has it any more ({entry.package} {entry.version})", "remove the entry"
    )


if __name__ == "__main__":
    posargs.run(sys.argv[1:], parse_options, run)
