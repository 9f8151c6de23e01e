from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import pytest

from devtools.locks import audit
from devtools.locks.audit import Audited, Vulnerability
from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.core.report import Report, Status

DAY = date(2026, 12, 1)
PICKLE = Vulnerability("PYSEC-2025-1", ("CVE-2025-1", "GHSA-x"), ("2.0",), "runs code\nfrom a file")
ENTRY = """\
  - {{id: {id}, package: {package}, version: "{version}", why: not reached, guard: preflight, until: {until}}}
"""


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one lock: engine on every system, kernels on Linux alone."""
    folder = tmp_path / "constraints"
    folder.mkdir()
    digest = f"--hash=sha256:{'0' * 64}\n"
    (folder / "train.in").write_text("engine\n")
    (folder / "train.txt").write_text(
        f"engine==1.0 {digest}kernels==3.0 ; sys_platform == 'linux' {digest}absent==1 ; os_name == 'nt' {digest}"
    )
    monkeypatch.setattr(settings, "CONSTRAINTS", folder)
    monkeypatch.setattr(settings, "CONFIG", tmp_path)
    accept(tmp_path)
    return tmp_path


def accept(room: Path, *entries: str) -> None:
    (room / "audit.yaml").write_text("accepted:\n" + ("".join(entries) or "  []\n"))


def entry(
    id: str = "CVE-2025-1", package: str = "engine", version: str = "1.0", until: str = "2027-01-31"
) -> str:
    return ENTRY.format(id=id, package=package, version=version, until=until)


def service(versions: Mapping[str, str]) -> tuple[Audited, ...]:
    """Answers as pip-audit does: engine is vulnerable, everything else is not."""
    return tuple(
        Audited(name, version, (PICKLE,) if name == "engine" else ()) for name, version in versions.items()
    )


def run(day: date = DAY, using: audit.Service = service) -> Report:
    return audit.run(audit.parse_options([]), using, day)


def test_a_vulnerability_that_nobody_accepted_fails_with_the_fixed_version(room: Path) -> None:
    (check,) = run().checks
    assert check.status is Status.FAIL
    assert check.name == "train: engine 1.0 PYSEC-2025-1"
    assert check.detail == "runs code from a file\nfixed in 2.0"
    assert "nox -s lock -- train" in check.fix


@pytest.mark.parametrize("id", ["PYSEC-2025-1", "CVE-2025-1", "GHSA-x"])
def test_an_accepted_one_passes_by_any_of_its_names_and_tells_the_guard(room: Path, id: str) -> None:
    accept(room, entry(id))
    report = run()
    assert report.ok
    assert report.checks[0].status is Status.WARN
    assert "guard: preflight" in report.checks[0].detail


@pytest.mark.parametrize(("day", "good"), [(date(2027, 1, 31), True), (date(2027, 2, 1), False)])
def test_an_acceptance_counts_to_the_end_of_its_day(room: Path, day: date, good: bool) -> None:
    accept(room, entry(until="2027-01-31"))
    assert run(day).ok is good


@pytest.mark.parametrize("other", [entry(id="CVE-2025-2"), entry(package="kernels"), entry(version="1.1")])
def test_an_acceptance_of_something_else_does_not_count_and_is_named(room: Path, other: str) -> None:
    accept(room, other)
    report = run()
    assert [check.status for check in report.checks] == [Status.FAIL, Status.WARN]
    assert "no lock has it any more" in report.checks[1].detail


def test_what_linux_alone_installs_is_asked_about_and_what_neither_does_is_not(room: Path) -> None:
    looked_up: list[Mapping[str, str]] = []

    def note(versions: Mapping[str, str]) -> tuple[Audited, ...]:
        looked_up.append(versions)
        return ()

    run(using=note)
    assert looked_up == [{"engine": "1.0", "kernels": "3.0"}]


def test_two_versions_of_one_package_are_two_questions(room: Path) -> None:
    digest = f"--hash=sha256:{'0' * 64}\n"
    (room / "constraints" / "train.txt").write_text(
        f"engine==1.0 ; sys_platform == 'linux' {digest}engine==2.0 ; sys_platform == 'darwin' {digest}"
    )
    assert [check.name for check in run().checks] == [
        "train: engine 2.0 PYSEC-2025-1",
        "train: engine 1.0 PYSEC-2025-1",
    ]


def test_a_service_that_cannot_be_reached_is_no_good_audit(room: Path) -> None:
    def gone(versions: Mapping[str, str]) -> tuple[Audited, ...]:
        raise audit.Unreachable("Name or service not known")

    accept(room, entry())
    (check,) = run(using=gone).checks  # and no acceptance is called superfluous
    assert check.status is Status.FAIL
    assert "NOT AUDITED" in check.detail
    assert "Name or service not known" in check.detail


def test_a_package_that_the_service_does_not_know_is_no_good_audit(room: Path) -> None:
    def partial(versions: Mapping[str, str]) -> tuple[Audited, ...]:
        return (Audited("engine", skip_reason="engine (1.0) not found"), Audited("kernels", "3.0"))

    (check,) = run(using=partial).checks
    assert check.status is Status.FAIL
    assert "1 of 2 packages: engine (1.0) not found" in check.detail


def test_a_lock_without_a_vulnerability_passes(room: Path) -> None:
    def clean(versions: Mapping[str, str]) -> tuple[Audited, ...]:
        return tuple(Audited(name, version) for name, version in versions.items())

    assert [check.status for check in run(using=clean).checks] == [Status.PASS]


@pytest.fixture
def auditor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that is started instead of pip-audit; its answer is written by the test."""
    script = tmp_path / "auditor"
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_pip_audits_own_answer_is_understood(auditor: Path) -> None:
    answer = (
        '{"dependencies": [{"name": "engine", "version": "1.0", "vulns": [{"id": "PYSEC-2025-1", '
        '"fix_versions": ["2.0"], "aliases": ["CVE-2025-1"], "description": "runs code"}]}, '
        '{"name": "other", "skip_reason": "not found"}], "fixes": []}'
    )
    auditor.write_text(f"#!/bin/sh\ncat <<'EOF'\n{answer}\nEOF\nexit 1\n")
    auditor.chmod(0o755)
    found = audit.pip_audit({"engine": "1.0"})
    assert found[0].vulns[0] == Vulnerability("PYSEC-2025-1", ("CVE-2025-1",), ("2.0",), "runs code")
    assert found[1].skip_reason == "not found"


def test_an_auditor_that_breaks_off_is_not_taken_for_good(auditor: Path) -> None:
    auditor.write_text("#!/bin/sh\necho 'Max retries exceeded' >&2\nexit 1\n")
    auditor.chmod(0o755)
    with pytest.raises(audit.Unreachable, match="Max retries exceeded"):
        audit.pip_audit({"engine": "1.0"})


def test_the_real_auditor_says_when_its_service_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(audit.Unreachable):
        audit.pip_audit({"engine-of-nobody": "1.0"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accepted:\n  - {id: x}\n", "missing required field"),
        ("accepted:\n" + entry().replace("2027-01-31", "later"), "until"),
        ("accepted: []\nextra: 1\n", "unknown field"),
    ],
)
def test_a_wrong_list_of_acceptances_is_refused(room: Path, text: str, message: str) -> None:
    (room / "audit.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        run()


def test_only_known_locks_are_taken(room: Path) -> None:
    with pytest.raises(UsageError, match="'nothing'"):
        audit.parse_options(["nothing"])


def test_the_projects_own_acceptances_are_of_what_its_locks_hold() -> None:
    def everything(versions: Mapping[str, str]) -> tuple[Audited, ...]:
        known = ("CVE-2025-32434", "CVE-2026-24747")
        return tuple(
            Audited(
                n, v, tuple(Vulnerability(each) for each in known) if (n, v) == ("torch", "2.5.1") else ()
            )
            for n, v in versions.items()
        )

    report = audit.run(audit.parse_options([]), everything, DAY)
    assert report.ok, [check for check in report.checks if check.status is Status.FAIL]
    assert not [check for check in report.checks if "no lock has it" in check.detail]
