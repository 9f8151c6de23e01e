"""An installation with a small page."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohya_mps.core.settings import Settings
from tests.support.web_pages import make_installation


@pytest.fixture
def installation(tmp_path: Path) -> Settings:
    """A home with a checkout and an active environment that has the page."""
    return make_installation(tmp_path)
