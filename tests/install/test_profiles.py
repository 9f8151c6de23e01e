from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.install import accelerate_config, lockfile


def choose(monkeypatch: pytest.MonkeyPatch, profile: str, device: str, macos: str) -> settings.Settings:
    """Settings of a profile on a machine with this device and, for MPS, this macOS."""
    monkeypatch.setenv("KOHYA_PROFILE", profile)
    monkeypatch.setattr(accelerate_config, "expected_device", lambda: device)
    for module in (settings, accelerate_config):
        monkeypatch.setattr(module, "macos_version", lambda: macos)
    return settings.load()


@pytest.mark.parametrize(
    ("profile", "device", "macos", "allowed"),
    [
        ("validated", "mps", "15.1", {"no"}),
        ("validated", "cpu", "0", {"no", "bf16"}),
        ("latest", "mps", "15.1", {"no", "fp16", "bf16"}),
        ("latest", "mps", "14.0", {"no", "fp16", "bf16"}),
        ("latest", "mps", "13.7.1", {"no", "fp16"}),
        ("latest", "cpu", "0", {"no", "bf16"}),
        ("latest", "cuda", "0", {"no", "fp16", "bf16"}),
    ],
)
def test_a_profiles_data_decides_which_precisions_are_taken(
    monkeypatch: pytest.MonkeyPatch, profile: str, device: str, macos: str, allowed: set[str]
) -> None:
    chosen = choose(monkeypatch, profile, device, macos)
    for precision in ("no", "fp16", "bf16"):
        with_precision = msgspec.structs.replace(chosen, mixed_precision=precision)
        if precision in allowed:
            accelerate_config.check_precision(with_precision)
        else:
            with pytest.raises(UsageError, match=f"'{precision}' does not work on {device}"):
                accelerate_config.check_precision(with_precision)


def test_a_macos_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_precision = msgspec.structs.replace(
        choose(monkeypatch, "latest", "mps", "13.7"), mixed_precision="bf16"
    )
    with pytest.raises(UsageError, match=r"needs macOS 14\.0 there, and this is 13\.7"):
        accelerate_config.check_precision(with_precision)


@pytest.mark.parametrize(
    ("old", "new"), [('macos: "15.0"', 'macos: "soon"'), ('bf16: "14.0"', 'bf16: "Sonoma"')]
)
def test_an_invalid_release_is_refused(tmp_path: Path, old: str, new: str) -> None:
    shutil.copytree(settings.CONFIG, tmp_path / "config")
    path = tmp_path / "config" / "profiles" / "latest.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match="accepted: a release of macOS"):
        settings.load_profile("latest", config=tmp_path / "config")


@pytest.mark.parametrize("name", settings.profile_names())
def test_what_a_profile_says_of_its_versions_is_what_its_lock_holds(name: str) -> None:
    profile = settings.load_profile(name)
    versions = lockfile.read(profile.lock_file).versions(lockfile.MAC_ARM64)
    assert f"torch {versions['torch']} and accelerate {versions['accelerate']}" in profile.summary


@pytest.mark.parametrize("name", settings.profile_names())
def test_the_page_of_profiles_says_what_their_data_says(name: str) -> None:
    rows = {}
    for line in (settings.ROOT / "docs" / "profiles.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            rows[cells[0]] = cells
    column = rows[""].index(f"`{name}`")
    profile = settings.load_profile(name)
    versions = lockfile.read(profile.lock_file).versions(lockfile.MAC_ARM64)
    assert rows["lowest macOS"][column] == profile.macos
    assert rows["torch, accelerate"][column] == f"{versions['torch']}, {versions['accelerate']}"
    listed = rows["mixed precision on MPS"][column].split(" (")[0].replace("`", "").split(", ")
    assert tuple(listed) == profile.mixed_precision["mps"]
