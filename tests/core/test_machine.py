from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest

from kohya_mps.core import machine, settings


def test_a_mac_is_expected_to_train_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    assert machine.expected_device() == "mps"
    assert machine.expected_architecture() == "arm64"
    assert settings.load().profile.forbidden_here()[-1] == "triton"


def test_elsewhere_the_expected_device_is_never_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert machine.expected_device() in ("cuda", "cpu")
    assert machine.expected_architecture() == "x86_64"
    assert "triton" not in settings.load().profile.forbidden_here()


def test_the_free_disk_of_a_path_is_that_of_the_disk_it_would_be_made_on(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 1e9
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "a" / "b", tmp_path / "link", tmp_path / "link" / "below"):
        assert machine.free_disk_gb(path) == pytest.approx(free, abs=1)


@pytest.mark.parametrize("driver", [True, False])
def test_cuda_is_expected_where_its_driver_is_loaded(driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: driver if str(path) == "/proc/driver/nvidia/version" else exists(path)
    )
    assert machine.expected_device() == ("cuda" if driver else "cpu")


def test_the_memory_is_that_of_the_machine() -> None:
    assert machine.memory_gb() == pytest.approx(psutil.virtual_memory().total / 1e9, rel=0.01)


def test_the_version_of_macos_is_0_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.mac_ver", lambda: ("", ("", "", ""), ""))
    assert machine.macos_version() == "0"
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    assert machine.macos_version() == "15.1"
