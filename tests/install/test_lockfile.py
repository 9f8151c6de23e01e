from __future__ import annotations

import re
from pathlib import Path

import pytest

from devtools.locks import in_file
from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.install import lockfile
from kohya_mps.install.lockfile import LINUX_X86_64, MAC_ARM64

HASH = "--hash=sha256:" + "0" * 64
LOCKS = sorted(settings.CONSTRAINTS.glob("*.txt"))

# What was validated with the pinned checkout; another torch is another profile.
VALIDATED = {
    "torch": "2.5.1",
    "torchvision": "0.20.1",
    "accelerate": "1.3.0",
    "transformers": "4.48.1",
    "diffusers": "0.32.2",
    "lycoris-lora": "3.4.0",
}


def lock(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some.txt"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        lockfile.read(lock(tmp_path, text))
    return str(caught.value)


def test_pins_are_read_with_version_marker_and_hashes(tmp_path: Path) -> None:
    text = f"""\
# a comment
Some.Name==1.0 \\
    {HASH} \\
    --hash=sha256:{"1" * 64}
    # via -r some.in
only-mac==2.0 ; sys_platform == 'darwin' \\
    {HASH}
last[extra]==3.0+local {HASH} # why
"""
    read = lockfile.read(lock(tmp_path, text))
    assert [(pin.name, pin.version, len(pin.hashes)) for pin in read.pins] == [
        ("some-name", "1.0", 2), ("only-mac", "2.0", 1), ("last", "3.0+local", 1)
    ]  # fmt: skip
    assert read.versions(MAC_ARM64) == {"some-name": "1.0", "only-mac": "2.0", "last": "3.0+local"}
    assert read.versions(LINUX_X86_64) == {"some-name": "1.0", "last": "3.0+local"}
    assert read.digest == lockfile.digest(read.path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("torch>=2.5.1 " + HASH, "not pinned to one version"),
        ("torch==2.5.* " + HASH, "not pinned to one version"),
        ("torch===2.5.1 " + HASH, "not pinned to one version"),
        ("torch==2.5.1,!=2.5.2 " + HASH, "not pinned to one version"),
        ("torch " + HASH, "not pinned to one version"),
        ("torch @ https://host.invalid/torch-2.5.1-py3-none-any.whl " + HASH, "not pinned to one version"),
        ("torch==2.5.1", "hash"),
        ("torch==2.5.1 --hash=md5:" + "0" * 32, "hash"),
        ("torch==2.5.1 --hash=sha256:" + "0" * 63, "hash"),
        ("torch==2.5.1 " + HASH + " --hash=sha256:x", "hash"),
        ("--index-url https://host.invalid/simple", "not a pin"),
        ("-r other.txt", "not a pin"),
        ("-e .", "not a pin"),
        ("./torch-2.5.1-py3-none-any.whl " + HASH, "not a pin"),
        ("torch==2.5.1 ; sys_platform = 'darwin' " + HASH, "not a pin"),
        ("<<<<<<< HEAD", "not a pin"),
    ],
)
def test_a_line_that_is_no_exact_hashed_pin_is_refused_with_its_line(
    line: str, reason: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, f"# first\ngood==1 \\\n    {HASH}\n{line}\n")
    assert f"{tmp_path}/some.txt:4: " in message
    assert reason in message
    assert "git checkout -- " in message


def test_a_lock_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    assert "some.txt:1: " in refused(tmp_path, "torch==2.5.1 \\\n")


def test_a_missing_an_empty_and_a_binary_lock_are_refused(tmp_path: Path) -> None:
    assert "holds no pins" in refused(tmp_path, "# nothing\n")
    (tmp_path / "some.txt").write_bytes(b"\xff\x00")
    for path in (tmp_path / "some.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            lockfile.read(path)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_committed_lock_is_exact_hashed_and_names_no_index_or_path(path: Path) -> None:
    assert lockfile.read(path).pins
    for text in (path.read_text(encoding="utf-8"), path.with_suffix(".in").read_text(encoding="utf-8")):
        assert not re.search(
            r"https?:|file:|--(extra-)?index|--find-links|(^|\s)/\w|\b\w+\.(org|com|net|io)\b", text
        )
    assert f"nox -s lock -- {path.stem}" in path.read_text(encoding="utf-8").splitlines()[1]


def test_every_intent_has_its_lock_and_every_lock_its_intent() -> None:
    assert {path.stem for path in LOCKS} == set(in_file.lock_names())
    order = in_file.lock_names()  # a lock that follows another's pins is made after it
    for first, then in (("tools", "dev"), ("train", "gui"), ("latest", "gui-latest")):
        assert order.index(first) < order.index(then)


def test_the_validated_lock_has_the_validated_set_on_both_systems() -> None:
    read = lockfile.read(settings.load_profile("validated").lock_file)
    for machine in (MAC_ARM64, LINUX_X86_64):
        versions = read.versions(machine)
        assert versions.items() >= VALIDATED.items()
        # tensorboard up to 2.20 imports pkg_resources, which setuptools dropped in 82.
        assert int(versions["setuptools"].partition(".")[0]) < 82


@pytest.mark.parametrize("name", settings.profile_names())
def test_no_lock_of_a_profile_brings_a_forbidden_package(name: str) -> None:
    profile = settings.load_profile(name)
    read = lockfile.read(profile.lock_file)
    on_mac = read.versions(MAC_ARM64).keys()
    assert not on_mac & {*profile.forbidden.any, *profile.forbidden.darwin}
    assert not read.versions(LINUX_X86_64).keys() & set(profile.forbidden.any)
    assert not [pin for pin in on_mac if pin.startswith("nvidia-")]
    assert {"bitsandbytes", "xformers"} <= set(profile.forbidden.any)
    assert "triton" in profile.forbidden.darwin


def test_a_mac_gets_fewer_packages_than_linux_and_no_others() -> None:
    read = lockfile.read(settings.load_profile("validated").lock_file)
    assert read.versions(MAC_ARM64).items() < read.versions(LINUX_X86_64).items()
    assert "triton" in read.versions(LINUX_X86_64)  # torch's own build for CUDA needs it there


def test_the_markers_that_are_used_are_the_machines_own() -> None:
    assert lockfile.here(mac=True) is MAC_ARM64
    assert lockfile.here(mac=False) is LINUX_X86_64
