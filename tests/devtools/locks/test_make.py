from __future__ import annotations

from pathlib import Path

import pytest

from devtools.locks import make
from kohya_mps.core.errors import KohyaError, StepFailed, UsageError
from kohya_mps.install import lockfile
from tests.support.lock_files import failures, write_in_file
from tests.support.wheelhouse import wheel


def test_a_lock_is_made_once_and_the_second_time_is_the_same(constraints: Path) -> None:
    write_in_file(constraints, "plain")
    first = make.make("train").read_text(encoding="utf-8")
    assert "nox -s lock -- train" in first.splitlines()[1]
    assert make.make("train").read_text(encoding="utf-8") == first
    assert lockfile.read(constraints / "train.txt").versions(lockfile.MAC_ARM64) == {"plain": "1.1"}
    assert not failures()


def test_an_override_counts_in_place_of_what_a_distribution_says(constraints: Path) -> None:
    house = constraints.parent / "wheels"
    wheel(house, "page", "1.0", requires=["plain<1.1"])
    write_in_file(constraints, "plain==1.1")
    make.make("train")
    write_in_file(constraints, "-c train.txt", "page", name="gui")
    with pytest.raises(StepFailed, match=r"plain<1\.1"):
        make.make("gui")
    write_in_file(constraints, "-c train.txt", "page", "# override: plain>=1.1", name="gui")
    make.make("gui")
    assert lockfile.read(constraints / "gui.txt").versions(lockfile.MAC_ARM64)["plain"] == "1.1"
    assert not failures()
    write_in_file(constraints, "-c train.txt", "page", name="gui")
    assert any("-override plain>=1.1" in detail for detail in failures())


def test_versions_stay_until_an_upgrade_is_asked_for(constraints: Path) -> None:
    write_in_file(constraints, "plain==1.0")
    make.make("train")
    write_in_file(constraints, "plain")
    make.make("train")
    assert lockfile.read(constraints / "train.txt").pins[0].version == "1.0"
    report = make.make_all(make.parse_options(["--upgrade"]))
    assert lockfile.read(constraints / "train.txt").pins[0].version == "1.1"
    assert "plain 1.0 -> 1.1" in report.checks[0].detail


def test_a_cutoff_is_written_into_the_in_file_and_a_bad_one_is_refused(constraints: Path) -> None:
    source = write_in_file(constraints, "plain")
    make.make_all(make.parse_options(["train", "--cutoff", "2026-03-01"]))
    assert "# exclude-newer: 2026-03-01" in source.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="2026-02-31"):
        make.make("train", cutoff="2026-02-31")


def test_a_failed_lock_changes_neither_file(constraints: Path) -> None:
    source = write_in_file(constraints, "plain")
    make.make("train")
    write_in_file(constraints, "outer")
    before = source.read_bytes(), (constraints / "train.txt").read_bytes()
    with pytest.raises(StepFailed):
        make.make("train", cutoff="2026-03-01")
    assert (source.read_bytes(), (constraints / "train.txt").read_bytes()) == before


def test_only_known_names_are_taken(constraints: Path) -> None:
    write_in_file(constraints, "plain")
    write_in_file(constraints, "plain", name="gui")
    assert set(make.parse_options([]).names) == {"train", "gui"}
    assert make.parse_options(["--profile", "validated"]).names == ("train", "gui")
    with pytest.raises(UsageError, match="'nothing'"):
        make.parse_options(["nothing"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["plain", "outer"], "outer needs middle needs triton, and triton is forbidden on macOS"),
        (["linux-outer"], "linux-outer needs linux-only\n"),
        (["uses-source"], "uses-source needs sourceonly\n"),
        (["plain==1.0", "plain==1.1"], "you require plain==1.0 and plain==1.1"),
        (["nowhere-to-be-found"], "nowhere-to-be-found was not found"),
    ],
    ids=["forbidden", "no wheel for a Mac", "source only", "contradiction", "unknown"],
)
def test_what_a_mac_cannot_install_is_refused_with_its_chain(
    constraints: Path, lines: list[str], message: str
) -> None:
    write_in_file(constraints, *lines)
    with pytest.raises(StepFailed) as refusal:
        make.make("train")
    assert message in refusal.value.what
    assert "nox -s lock -- train" in refusal.value.fix or "leave" in refusal.value.fix
    assert not (constraints / "train.txt").exists()


def test_a_forbidden_package_that_only_linux_installs_is_allowed(constraints: Path) -> None:
    write_in_file(constraints, "triton ; sys_platform == 'linux'", "plain")
    make.make("train")
    assert not failures()


def test_a_missing_lock_or_in_file_is_refused(constraints: Path) -> None:
    write_in_file(constraints, "-r gone.in", "plain")
    assert "cannot be read" in failures()[0]
    with pytest.raises(KohyaError, match=r"gone\.in"):
        make.make("train")
