from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kohya_mps.core.errors import StepFailed
from kohya_mps.install import git
from tests.support import installs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with one commit on the branch ``main``."""
    path = tmp_path / "it's a tree"
    path.mkdir()
    installs.git(path, "init", "--quiet")
    (path / "file").write_text("first\n")
    installs.git(path, "add", "-A")
    installs.git(path, "commit", "--quiet", "-m", "first")
    return path


def head(tree: Path) -> str:
    return installs.git(tree, "rev-parse", "HEAD")


def test_a_command_that_fails_is_an_error_with_gits_own_message(tree: Path) -> None:
    assert git.output(tree, "rev-parse", "HEAD").strip() == head(tree)
    with pytest.raises(StepFailed, match=r"git rev-parse failed in .*it's a tree: fatal: .*no-such-branch"):
        git.output(tree, "rev-parse", "no-such-branch")
    assert git.run(tree, "rev-parse", "no-such-branch").returncode != 0


def test_a_repository_in_a_parent_directory_is_not_taken(tree: Path) -> None:
    inside = tree / "inside"
    inside.mkdir()
    assert git.run(inside, "rev-parse", "HEAD").returncode != 0


def test_messages_are_english_and_the_users_active_repository_is_ignored(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    variables = git.environment(tree)
    assert variables["LC_ALL"] == "C"
    assert variables["GIT_TERMINAL_PROMPT"] == "0"
    assert "GIT_DIR" not in variables


def test_looking_at_the_status_does_not_lock_the_index(tree: Path) -> None:
    before = (tree / ".git" / "index").stat().st_mtime_ns
    (tree / "file").touch()
    assert git.status(tree) == []
    assert (tree / ".git" / "index").stat().st_mtime_ns == before


def test_the_status_lists_a_rename_as_two_paths_and_names_as_they_are(tree: Path) -> None:
    installs.git(tree, "mv", "file", "größer\n2")
    (tree / "new file").touch()
    assert sorted(git.status(tree)) == ["file", "größer\n2", "new file"]
    assert sorted(git.status(tree, "--untracked-files=no")) == ["file", "größer\n2"]


@pytest.mark.parametrize(
    "message", ["error: unable to write: No space left on device\n", "fatal: Out of diskspace\n"]
)
def test_a_full_disk_is_recognized_in_gits_message(message: str) -> None:
    with pytest.raises(StepFailed, match=f"the disk is full: {message.strip()}") as caught:
        git.check_disk_full(f"something before\n{message}")
    assert "free some space" in caught.value.fix


def test_another_message_is_no_full_disk() -> None:
    git.check_disk_full("fatal: could not read from remote repository")
    git.check_disk_full("")


def test_the_commit_is_read_from_a_branch_from_packed_refs_and_from_a_detached_head(tree: Path) -> None:
    assert git.read_head(tree) == head(tree)
    # Another branch, whose name ends in the same way and comes first.
    installs.git(tree, "checkout", "--quiet", "-b", "a/refs/heads/main")
    installs.git(tree, "commit", "--quiet", "--allow-empty", "-m", "other")
    installs.git(tree, "checkout", "--quiet", "main")
    installs.git(tree, "pack-refs", "--all")
    assert not (tree / ".git" / "refs" / "heads" / "main").exists()
    assert git.read_head(tree) == head(tree)
    installs.git(tree, "checkout", "--quiet", "--detach")
    assert git.read_head(tree) == head(tree)


@pytest.mark.parametrize(
    "content", [b"", b"ref: refs/heads/gone\n", bytes(41), b"\xff\xfe", b"not a commit\n", b"abc123\n"]
)
def test_a_head_that_names_no_commit_is_empty(content: bytes, tree: Path) -> None:
    (tree / ".git" / "HEAD").write_bytes(content)
    assert git.read_head(tree) == ""
    (tree / ".git" / "HEAD").unlink()
    assert git.read_head(tree) == ""


def test_the_repository_of_a_worktree_or_submodule_is_found_through_its_pointer(
    tree: Path, tmp_path: Path
) -> None:
    assert git.repository(tree) == tree / ".git"
    other = tmp_path / "other"
    subprocess.run(["git", "-C", tree, "worktree", "add", "--quiet", "--detach", other], check=True)
    assert (other / ".git").is_file()
    assert git.repository(other) == tree / ".git" / "worktrees" / "other"
    assert git.read_head(other) == head(tree)


def test_a_spoilt_pointer_is_no_error(tmp_path: Path) -> None:
    (tmp_path / ".git").write_bytes(b"gitdir: \0\xff\n")
    assert not git.repository(tmp_path).is_dir()
    assert git.read_head(tmp_path) == ""
