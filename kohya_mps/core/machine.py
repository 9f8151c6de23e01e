"""This machine: its system, memory, disk and device."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from .files import existing_ancestor


def on_mac() -> bool:
    """Whether this is macOS, where the expected device is MPS and nothing else."""
    return sys.platform == "darwin"


def macos_version() -> str:
    """The version of macOS; ``0`` on another system."""
    return platform.mac_ver()[0] or "0"


def expected_architecture() -> str:
    """The architecture that the locks are made for, as ``platform.machine()`` names it."""
    return "arm64" if on_mac() else "x86_64"


def memory_gb() -> float:
    """The machine's memory in gigabytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def free_disk_gb(path: Path) -> float:
    """The free space, in gigabytes, of the disk that has or would have ``path``."""
    existing = existing_ancestor(path)
    if not existing.exists():  # a link that leads nowhere
        existing = existing.parent
    return shutil.disk_usage(existing).free / 1e9


def expected_device() -> str:
    """The device that training has to use on this machine: ``mps``, ``cuda`` or ``cpu``.

    On a Mac it is always MPS. Elsewhere it is CUDA if NVIDIA's driver is loaded.
    """
    if on_mac():
        return "mps"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"
