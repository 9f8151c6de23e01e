from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kohya_mps.core.files import existing_ancestor, link_atomic, write_atomic

ROOT = Path(__file__).parents[2]


def test_the_existing_ancestor_is_the_path_or_the_nearest_directory_above_it(tmp_path: Path) -> None:
    assert existing_ancestor(tmp_path) == tmp_path
    assert existing_ancestor(tmp_path / "a" / "b" / ("c" * 300)) == tmp_path
    (tmp_path / "file").touch()
    assert existing_ancestor(tmp_path / "file" / "below") == tmp_path / "file"
    (tmp_path / "link").symlink_to("nowhere")
    assert existing_ancestor(tmp_path / "link" / "below") == tmp_path / "link"


def test_a_relative_path_has_an_existing_ancestor_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert existing_ancestor(Path("a/b")) == Path()


def test_a_file_is_replaced_whole_and_is_nobody_elses_to_change(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    os.umask(mask := os.umask(0))
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    os.umask(mask)
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_a_killed_write_left_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    killed = "import os, sys; os.fsync = lambda _: os._exit(9); from pathlib import Path\n"
    killed += "from kohya_mps.core.files import write_atomic; write_atomic(Path(sys.argv[1]), b'half')"
    assert subprocess.run([sys.executable, "-c", killed, path], cwd=ROOT, check=False).returncode == 9
    assert not path.exists()
    assert len(list(tmp_path.glob(".file*"))) == 1

    write_atomic(path, b"whole")

    assert path.read_bytes() == b"whole"
    assert list(tmp_path.glob(".file*")) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["file"]


def test_a_link_is_switched_in_one_step_and_moves_with_its_home(tmp_path: Path) -> None:
    root = tmp_path / "home"
    for name in ("one", "two"):
        (root / "generations" / name).mkdir(parents=True)
    link_atomic(root / "venv", root / "generations" / "one")
    (root / ".venv.new").symlink_to("left by a killed run")
    link_atomic(root / "venv", root / "generations" / "two")
    assert (root / "venv").samefile(root / "generations" / "two")
    moved = root.rename(tmp_path / "moved")
    assert (moved / "venv").samefile(moved / "generations" / "two")
    assert not os.path.lexists(moved / ".venv.new")
