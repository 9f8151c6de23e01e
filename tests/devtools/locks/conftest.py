from __future__ import annotations

from pathlib import Path

import pytest

from kohya_mps.core import settings
from tests.support.wheelhouse import LINUX, source_archive, wheel


@pytest.fixture
def constraints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A constraints directory whose packages come from a folder next to it."""
    folder = tmp_path / "constraints"
    folder.mkdir()
    monkeypatch.setattr(settings, "CONSTRAINTS", folder)
    monkeypatch.setattr(settings, "profile_names", lambda *_: ["validated"])
    house = tmp_path / "wheels"
    wheel(house, "plain", "1.0")
    wheel(house, "plain", "1.1")
    wheel(house, "outer", "2.0", requires=["middle>=1"])
    wheel(house, "middle", "1.0", requires=["triton"])
    wheel(house, "triton", "3.1")
    wheel(house, "linux-outer", "1.0", requires=["linux-only"])
    wheel(house, "linux-only", "1.0", tag=LINUX)
    wheel(house, "uses-source", "1.0", requires=["sourceonly"])
    source_archive(house, "sourceonly", "1.0")
    return folder
