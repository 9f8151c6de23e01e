"""The faults of ``nox -s chaos``, small: a lock of a few small wheels and two small repositories."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from devtools.chaos.testbed import SMALL, SMALL_PROFILE, Testbed
from kohya_mps.core import settings
from tests.support.installs import Upstream
from tests.support.wheelhouse import pin, wheel


@pytest.fixture
def testbed(
    request: pytest.FixtureRequest, tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> Testbed:
    """A copy of the project that installs a few small wheels and checks out the small upstream."""
    house, root = tmp_path / "wheels", tmp_path / "chaos"
    pins = [
        pin(wheel(house, name, "1.0", files={f"{name}/data": b"x" * 1000}))
        for name in ("plain", "other", *SMALL)
    ]
    monkeypatch.setenv("UV_FIND_LINKS", str(house))
    root.mkdir()
    chosen = msgspec.structs.replace(settings.load(), url=str(upstream.kohya_ss), commit=upstream.commit)
    kind: type[Testbed] = getattr(request, "param", Testbed)
    made = kind(root, chosen, SMALL_PROFILE, real=False)
    made.use_small_lock("".join(pins))
    return made
