"""What the tests share: a scrubbed machine, a small upstream, and a lock of small wheels."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

from tests.support.installs import PYTHON, Small, Upstream, make_profile, make_settings, make_upstream
from tests.support.wheelhouse import pin, wheel

_GIT_CONFIG = """\
[user]
    name = Somebody
    email = somebody@example.invalid
[init]
    defaultBranch = main
    templateDir =
[protocol "file"]
    allow = always
"""


def pytest_configure() -> None:
    """A shell starts what it puts into the background with Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Few examples while somebody waits, many in CI: --hypothesis-profile=many.
hypothesis.settings.register_profile("few", max_examples=10)
hypothesis.settings.register_profile("many", max_examples=100)
hypothesis.settings.load_profile("few")


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a home, a git configuration and a ``bin`` that has git and this Python."""
    root = tmp_path_factory.mktemp("machine")
    (root / "bin").mkdir()
    git = shutil.which("git")
    assert git, "the tests need git"
    (root / "bin" / "git").symlink_to(git)
    interpreter = Path(sys.base_prefix) / "bin" / f"python{PYTHON}"
    (root / "bin" / f"python{PYTHON}").symlink_to(interpreter.resolve())
    (root / "gitconfig").write_text(_GIT_CONFIG)
    return root


@pytest.fixture(autouse=True)
def isolated_machine(
    request: pytest.FixtureRequest, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the developer's own configuration reaches a test, and nothing of a test reaches it.

    Tests of the real environment or the real upstream are left with the variables that name those.
    """
    if any(request.node.get_closest_marker(name) for name in ("environment", "upstream")):
        return
    for name in list(os.environ):
        if name.startswith(
            ("KOHYA_", "PIP_", "UV_", "GIT_", "HF_", "XDG_", "CONDA", "PYTHON", "VIRTUAL_ENV")
        ):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them for its workers
        monkeypatch.delenv(name, raising=False)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.setenv("HOME", str(user))
    monkeypatch.setenv("PATH", os.pathsep.join((str(machine / "bin"), "/usr/bin", "/bin")))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(machine / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(machine / "uv-cache"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(machine / "uv-pythons"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setenv("UV_OFFLINE", "1")


@pytest.fixture(scope="session")
def _upstream(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Upstream:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(machine / "gitconfig"))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        return make_upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def upstream(_upstream: Upstream) -> Upstream:
    """The stand-in that tests share; one that changes it makes its own with ``make_upstream``."""
    return _upstream


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Wheels in a folder that uv is configured with, and a lock of them."""
    house = tmp_path / "wheels"
    first = wheel(house, "plain", "1.0", files={"plain/core.py": b"VALUE = 1\n"})
    second = wheel(house, "other-thing", "2.1", files={"other_thing/data.txt": b"some data\n"})
    locks = tmp_path / "constraints"
    locks.mkdir()
    (locks / "small.txt").write_text(pin(first) + pin(second))
    monkeypatch.setattr("kohya_mps.core.settings.CONSTRAINTS", locks)
    monkeypatch.setenv("UV_FIND_LINKS", str(house))
    return Small(locks / "small.txt", house, make_settings(tmp_path / "home", profile=make_profile("small")))
