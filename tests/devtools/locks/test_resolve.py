"""The locked uv says each of the sentences that devtools/locks/resolve.py reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from devtools.locks import cross_check, resolve
from kohya_mps.core.process import clean_environ
from kohya_mps.install import lockfile
from tests.support.wheelhouse import only, pin, source_archive, wheel


def ask_uv(constraints: Path, *lines: str) -> resolve.Resolution:
    """uv's answer for a Mac, with the packages of the fixture's folder."""
    (constraints / "question.in").write_text("\n".join(lines), encoding="utf-8")
    environ = clean_environ(extra={"MACOSX_DEPLOYMENT_TARGET": resolve.ANY_MACOS})
    arguments = ["question.in", "--no-index", "--find-links", "../wheels", *resolve.FOR_A_MAC]
    return resolve.resolve(arguments, cwd=constraints, env=environ)


def test_versions_are_read_by_canonical_name(constraints: Path) -> None:
    wheel(constraints.parent / "wheels", "Odd.Name", "1.0")
    found = ask_uv(constraints, "odd_name", "outer")
    assert found == resolve.Resolution(
        {"odd-name": "1.0", "outer": "2.0", "middle": "1.0", "triton": "3.1"}, ""
    )


def test_two_lines_that_exclude_each_other_are_both_named(constraints: Path) -> None:
    wheel(constraints.parent / "wheels", "old", "1.0", requires=["plain<1.1"])
    reason = ask_uv(constraints, "old==1.0", "plain==1.1", "middle").reason
    assert resolve.required_packages(reason, ["old", "plain", "middle"]) == ("old", "plain")
    assert resolve.cause(reason) == "all versions of old depend on plain<1.1 and you require old==1.0"
    assert not resolve.is_source_only(reason)
    assert not resolve.is_absent(reason)


@pytest.mark.parametrize("line", ["linux-only", "nowhere-to-be-found", "plain==9.9"])
def test_what_does_not_exist_for_a_mac_is_absent(constraints: Path, line: str) -> None:
    reason = ask_uv(constraints, line, "middle").reason
    assert resolve.is_absent(reason)
    assert not resolve.is_source_only(reason)
    package = line.partition("==")[0]
    assert resolve.required_packages(reason, ["middle", package]) == (package,)


def test_a_package_that_is_published_as_source_alone_is_blamed_with_its_chain(constraints: Path) -> None:
    reason = ask_uv(constraints, "uses-source").reason
    assert resolve.is_source_only(reason)
    assert resolve.culprit_chain(reason) == "uses-source needs sourceonly"


@pytest.mark.parametrize("line", ["linux-outer", "linux-outer==1.0"])
def test_the_chain_leads_to_the_package_without_a_wheel(constraints: Path, line: str) -> None:
    assert resolve.culprit_chain(ask_uv(constraints, line).reason) == "linux-outer needs linux-only"


def test_a_contradiction_blames_no_package(constraints: Path) -> None:
    assert resolve.culprit_chain(ask_uv(constraints, "plain==1.0", "plain==1.1").reason) == ""


def test_without_a_network_no_line_is_blamed(
    constraints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "empty-cache"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    (constraints / "question.in").write_text("plain\n", encoding="utf-8")
    reason = resolve.resolve(["question.in"], cwd=constraints, env=clean_environ()).reason
    assert "plain" in reason
    assert resolve.required_packages(reason, ["plain"]) == ()


@pytest.mark.parametrize("with_source", [False, True])
def test_a_pin_without_a_wheel_that_fits_is_told_from_other_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_source: bool
) -> None:
    house = tmp_path / "wheels"
    only(monkeypatch, house)
    newer = wheel(house, "core", "1.0", tag="cp311-cp311-macosx_14_0_arm64")
    if with_source:
        source_archive(house, "core", "1.0")
    (tmp_path / "core.txt").write_text(pin(newer))
    reason = cross_check.install(lockfile.read(tmp_path / "core.txt"), tmp_path / "tree", "11.0")
    assert resolve.has_no_fitting_wheel(reason)
    newer.write_bytes(wheel(tmp_path / "other", "core", "1.0", files={"core/more.py": b""}).read_bytes())
    reason = cross_check.install(lockfile.read(tmp_path / "core.txt"), tmp_path / "tree", "14.0")
    assert "mismatch" in reason
    assert not resolve.has_no_fitting_wheel(reason)
