"""The checks of the smoke probe that need no torch, and how it reports the others."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kohya_mps.core.settings import PROBES
from kohya_mps.probes import smoke
from tests.support.installs import PYTHON


def torch_with(*, cuda: bool = False, mps: bool = False) -> SimpleNamespace:
    """Stands in for torch, which is not installed where the tests run."""
    return SimpleNamespace(
        __version__="2.5.1",
        cuda=SimpleNamespace(is_available=lambda: cuda),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )


@pytest.mark.parametrize(
    ("expected", "cuda", "mps", "good"),
    [
        ("mps", False, True, True),
        ("mps", False, False, False),
        ("cuda", True, False, True),
        ("cuda", False, False, False),
        ("cpu", False, False, True),
        ("cpu", True, False, False),
        ("cpu", False, True, False),
    ],
)
def test_a_device_that_torch_does_not_find_or_that_is_not_expected_fails(
    expected: str, cuda: bool, mps: bool, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_with(cuda=cuda, mps=mps))
    found, detail = smoke.device({"device": expected})
    assert found is good
    assert detail.endswith(f"expected {expected}")


def test_every_module_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert smoke.imports({"modules": ["json", "csv"]}) == (True, "all 2 modules import")
    good, detail = smoke.imports({"modules": ["json", "no_such_module", "a_broken_module"]})
    assert not good
    assert "no_such_module: ModuleNotFoundError" in detail
    assert "a_broken_module: ZeroDivisionError" in detail
    assert "json" not in detail


def test_a_python_of_another_version_fails() -> None:
    good, detail = smoke.interpreter({"python": PYTHON})
    assert good
    assert platform.machine() in detail
    assert smoke.interpreter({"python": "3.1"})[0] is False
    assert smoke.interpreter({"python": "2.7"})[0] is False


@pytest.mark.parametrize(
    ("architecture", "translated", "good"),
    [("arm64", "0", True), ("arm64", "1", False), ("x86_64", "0", False), ("arm64", "", True)],
)
def test_on_a_mac_a_python_under_rosetta_fails(
    architecture: str, translated: str, good: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(f"#!/bin/sh\necho {translated}\n")
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    assert smoke.interpreter({"python": PYTHON})[0] is good


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only site-packages: two distributions."""
    path = tmp_path / "site-packages"
    for name, version in (("plain", "1.0"), ("Other_Thing", "2.1")):
        info = path / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p] + [str(path)])
    return path


@pytest.mark.parametrize(
    ("locked", "detail"),
    [
        ({"plain": "1.0", "other-thing": "2.1"}, "all 2 as locked"),
        ({"plain": "1.1", "other-thing": "2.1"}, "plain 1.0 instead of 1.1"),
        ({"plain": "1.0", "other-thing": "2.1", "gone": "3"}, "gone missing instead of 3"),
        ({"plain": "1.0"}, "other-thing 2.1 is not in the lock"),
    ],
)
@pytest.mark.usefixtures("site")
def test_what_is_installed_has_to_be_exactly_the_lock(locked: dict[str, str], detail: str) -> None:
    assert smoke.versions({"versions": locked}) == (detail.startswith("all"), detail)


@pytest.mark.usefixtures("site")
def test_a_forbidden_package_is_named_with_its_version() -> None:
    assert smoke.forbidden({"forbidden": ["bitsandbytes"]}) == (True, "none of bitsandbytes")
    assert smoke.forbidden({"forbidden": ["bitsandbytes", "plain"]}) == (False, "plain 1.0")


def isolated(tmp_path: Path, *options: str, prefix: str = sys.prefix, path: str = "") -> tuple[bool, str]:
    """Ask a fresh interpreter, which has nothing of pytest on its path."""
    code = (
        "import json, sys; sys.path[0] = sys.argv[1]; import smoke; sys.path += filter(None, [sys.argv[3]]);"
        "print(json.dumps(smoke.isolation({'prefix': sys.argv[2]})))"
    )
    done = subprocess.run(
        [sys.executable, *options, "-c", code, str(PROBES), prefix, path],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin", "PYTHONNOUSERSITE": "1"},
    )
    good, detail = json.loads(done.stdout)
    return good, detail


def test_nothing_may_be_imported_from_outside_the_environment(tmp_path: Path) -> None:
    assert isolated(tmp_path) == (True, sys.prefix)
    good, detail = isolated(tmp_path, path=str(tmp_path))
    assert not good
    assert f"sys.path has {tmp_path}" in detail
    good, detail = isolated(tmp_path, prefix=str(tmp_path))
    assert not good
    assert "the prefix is" in detail


def test_a_check_that_breaks_does_not_hide_the_others(tmp_path: Path) -> None:
    request = {
        "python": PYTHON,
        "versions": {},
        "forbidden": ["no-such"],
        "prefix": sys.prefix,
        "device": "cpu",
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    probe: list[str | Path] = [
        sys.executable,
        PROBES / "smoke.py",
        tmp_path / "request.json",
        tmp_path / "result.json",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "result.json").read_text())}
    assert list(rows) == [name for name, _, _ in smoke.CHECKS]
    assert rows["interpreter"]["good"] is True
    assert rows["forbidden packages"]["good"] is True
    assert rows["trainer's modules"]["good"] is False
    assert rows["trainer's modules"]["detail"] == "KeyError: 'modules'"
    assert all(row["fix"] for row in rows.values())
