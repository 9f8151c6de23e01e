from __future__ import annotations

import msgspec
import pytest

from kohya_mps.core.settings import Settings
from tests.support.installs import Small, Upstream
from tests.support.standin import make_lock


@pytest.fixture
def settings(small: Small, upstream: Upstream) -> Settings:
    """An upstream and a lock that set-up can install within a second."""
    make_lock(small.lock, small.wheels)
    return msgspec.structs.replace(small.settings, url=str(upstream.kohya_ss), commit=upstream.commit)
