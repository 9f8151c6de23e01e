"""The faults of ``nox -s chaos``, small: a lock of a few small wheels and two small repositories."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from devtools.chaos.testbed import SMALL, SMALL_PROFILE, Testbed
from kohya_mps.core import settings
from tests.support.installs import Upstream
from tests.support.standin import make_lock
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


class StandInTestbed(Testbed):
    """Its set-ups install a stand-in of accelerate and verify nothing: there is no torch."""

    @property
    def quick_setup(self) -> tuple[str, ...]:
        """A set-up without any verification."""
        return ("setup", "--no-verify")

    def active_passes_smoke(self) -> None:
        """The part of the check that needs no torch."""
        self.active_is_whole()


@pytest.fixture
def stand_in(tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> Testbed:
    """A testbed on which whole set-ups run, each in a second or two."""
    house, root = tmp_path / "wheels", tmp_path / "chaos"
    make_lock(tmp_path / "lock.txt", house)
    torch = wheel(house, "torch", "1.0", files={"torch/nn/functional.py": b"", "torch/nn/__init__.py": b""})
    lock = (tmp_path / "lock.txt").read_text() + pin(torch) + pin(wheel(house, "einops", "1.0"))
    monkeypatch.setenv("UV_FIND_LINKS", str(house))
    root.mkdir()
    chosen = msgspec.structs.replace(settings.load(), url=str(upstream.kohya_ss), commit=upstream.commit)
    made = StandInTestbed(root, chosen, SMALL_PROFILE, real=False)
    made.use_small_lock(lock)
    return made
