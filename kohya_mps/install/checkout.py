"""The checkout: kohya_ss at its pinned commit, sd-scripts at that commit's gitlink.

Both working trees are switched by the same code, which can be killed at any moment. Before
the first file changes, a record is written of the commit that the tree is at and the commit
that it is switched to. Only files that differ between the two are ever taken for leftovers
of an interrupted run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import msgspec

from kohya_mps.core.errors import KohyaError, StepFailed, UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import STATE, Installation, check_location
from kohya_mps.core.process import ProcessResult, capture, stream
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import check_unused, exclusive_lock
from kohya_mps.core.settings import Settings, without_secret
from kohya_mps.core.text import join_some

from . import git

SUBMODULE = "sd-scripts"
_REF = "refs/kohya-mps/"
MADE_HERE = "checkout-made-here"


class Commits(msgspec.Struct, frozen=True):
    """What is checked out: kohya_ss and its sd-scripts."""

    kohya_ss: str
    sd_scripts: str


def ensure_checkout(settings: Settings, *, stash: bool = False) -> Commits:
    """Check out the pinned commits, whatever state the checkout is in.

    Args:
        settings: the home, the repository and the commit.
        stash: put local changes away with ``git stash`` instead of refusing them.

    Raises:
        UsageError: the path or the commit is invalid, or there are local changes.
        Busy: another commit is checked out, and a training runs from it.
        StepFailed: the repository cannot be reached, or git failed.
    """
    home = Installation(settings.home)
    kohya_ss = _WorkingTree(home, home.root, settings, lambda: settings.url)
    sd_scripts = _WorkingTree(home, home.sd_scripts, settings, lambda: _submodule_url(home))
    for tree in (kohya_ss, sd_scripts):
        tree.replace_damaged_config()
    kohya_ss.ensure(settings.commit, stash)
    linked = gitlink(home, settings.commit)
    sd_scripts.ensure(linked, stash)
    return Commits(settings.commit, linked)


def clone(settings: Settings, *, stash: bool = False) -> Report:
    """``invoke clone``: check out the pinned commits and report them."""
    home = Installation(settings.home)
    check_location(home)
    with exclusive_lock(home):
        commits = ensure_checkout(settings, stash=stash)
    checks = (
        Check("kohya_ss", Status.PASS, f"{commits.kohya_ss} in {settings.home}"),
        Check(SUBMODULE, Status.PASS, commits.sd_scripts),
    )
    return Report("Checkout", checks, {"commits": commits, "home": str(settings.home)})


def present(home: Installation) -> Commits | None:
    """The commits that are checked out now; None when there is no usable checkout."""
    heads = []
    for tree in (home.root, home.sd_scripts):
        if not os.path.lexists(tree / ".git"):
            return None
        heads.append(git.run(tree, "rev-parse", "--verify", "--quiet", "HEAD").stdout.strip())
    return Commits(*heads) if all(heads) else None


def local_changes(tree: Path) -> list[str]:
    """Tracked files of one working tree that differ from its commit, as ``git status`` names them."""
    return git.status(tree, "--untracked-files=no")


def made_here(home: Installation) -> bool:
    """Whether this project made the checkout; one that was there before is the user's."""
    return (home.state / MADE_HERE).exists()


def was_interrupted(home: Installation) -> bool:
    """Whether a run was killed while it changed the checkout."""
    return any(home.state.glob("moving-*.json"))


def gitlink(home: Installation, commit: str) -> str:
    """The commit of sd-scripts that a commit of kohya_ss names."""
    entry = git.output(home.root, "ls-tree", commit, "--", SUBMODULE).split()
    if len(entry) < 3 or entry[1] != "commit":
        raise UsageError(
            f"commit {commit} has no {SUBMODULE} submodule, so it is no commit of kohya_ss",
            "check KOHYA_REPO_URL and KOHYA_COMMIT",
        )
    return entry[2]


def _submodule_url(home: Installation) -> str:
    """What git itself makes of the URL in .gitmodules, relative ones included."""
    git.output(home.root, "submodule", "--quiet", "init", "--", SUBMODULE)
    git.output(home.root, "submodule", "--quiet", "sync", "--", SUBMODULE)
    return git.output(home.root, "config", "--get", f"submodule.{SUBMODULE}.url").strip()


class _Stage(StrEnum):
    """How far a switch got; the values are in files on users' disks."""

    FETCH = "fetch"
    SWITCH = "switch"
    RENEW = "renew"


class _Move(msgspec.Struct, frozen=True):
    """The record of a switch: it exists while git may change anything.

    ``came_from`` is the commit that the files are of, empty in a first clone. ``goes_to`` is
    the commit that is checked out next.
    """

    stage: _Stage
    came_from: str
    goes_to: str


class _Damaged(Exception):
    """Git cannot read what it once wrote to this disk."""


class _WorkingTree:
    """One working tree, and how it gets to a commit.

    The stage in the record says what a killed run may have left, and so what the next does:

    ======  ==================================  ===============================================
    stage   what may be half done               the next run
    ======  ==================================  ===============================================
    (none)  nothing                             compares HEAD and the files with the commit
    FETCH   objects and refs; no file changed   removes git's locks, then as (none)
    SWITCH  files that differ between           removes git's locks, checks out ``goes_to`` over
            ``came_from`` and ``goes_to``       them; refuses if other files were changed, too
    RENEW   a new repository under unchanged    makes that repository again: HEAD at
            files; the damaged one is aside     ``came_from``, so that changed files show
    ======  ==================================  ===============================================

    A good run goes (none) -> FETCH -> SWITCH -> (none). A damaged repository, found in any
    stage, goes through RENEW -> (none) first. A first clone that was killed before it held
    a commit is deleted and begun again in FETCH.
    """

    def __init__(self, home: Installation, path: Path, settings: Settings, url: Callable[[], str]) -> None:
        self.home = home
        self.path = path
        self.stall_seconds = settings.network_stall_seconds
        self.url = url
        self.is_submodule = path == home.sd_scripts
        self.made_here = home.state / MADE_HERE
        self.record = home.state / "moving-sd-scripts.json" if self.is_submodule else home.checkout_move

    def replace_damaged_config(self) -> None:
        """Set a configuration aside that git cannot read: git fails with it, in a submodule, too."""
        config = git.repository(self.path) / "config"
        if not config.is_file():
            return
        read = [*git.command(config.parent), "config", "--file", str(config), "--list"]
        if capture(read, env=git.environment(self.path)).returncode:
            aside = _first_free(config.parent, "config.damaged")
            say(f"  {config} is damaged; it is kept as {aside.name}, a new one is made")
            config.rename(aside)
            self._run("init", "--quiet")

    def ensure(self, commit: str, stash: bool) -> None:
        """Check out a commit, from whatever state the tree is in.

        Raises:
            UsageError: there are local changes, or files that are not of this project.
            Busy: files would change that a training runs from.
            StepFailed: git failed, or the repository cannot be reached.
        """
        try:
            move = self._recorded()
            if move and move.stage is _Stage.RENEW:
                self._renew(move.came_from, commit)
            if not os.path.lexists(self.path / ".git"):
                self._init(commit)
            self._switch(commit, stash)
        except _Damaged as reason:
            self._replace_damaged_repository(str(reason), commit)
            self._switch(commit, stash)
        if not self.is_submodule:
            self._exclude(f"/{STATE}/")

    # -- (none) -> FETCH -> SWITCH -> (none) ----------------------------------------------------

    def _init(self, commit: str) -> None:
        """Make the empty repository of a first clone."""
        strangers = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if self.is_submodule and strangers and not self.record.exists():
            raise UsageError(
                f"{self.path} holds files but is no git working tree: {', '.join(strangers[:5])}",
                f"move it away, for instance `{shlex.join(['mv', str(self.path), f'{self.path}.old'])}`",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._enter(_Stage.FETCH, "", commit)
        if not self.is_submodule:
            write_atomic(self.made_here, b"")
        self._git("init", "--quiet")

    def _switch(self, commit: str, stash: bool) -> None:
        """Compare with the commit; where the tree differs, fetch the commit and check it out."""
        current = self._current_commit()
        if current not in ("", commit) and not self.is_submodule:
            self._refuse_other_projects()
        if current and not (git.repository(self.path) / "index").exists():
            self._git("reset", "--quiet")  # else every file counts as deleted and as untracked
        changed = self._local_changes() if current else []
        if changed and not stash:
            raise self._changes_refused(changed)
        if current == commit and not changed:
            return
        if current:
            check_unused(self.home, f"change the files of {self.path} under it")
        if changed:
            self._stash(len(changed))
        self._enter(_Stage.FETCH, current, commit)
        if not self._has(commit):
            self._fetch(commit)
        self._keep_on_branch(current)
        # A ref of ours, or git's clean-up would delete the commit; rollback needs it.
        self._git("update-ref", f"{_REF}{commit}", commit)
        self._enter(_Stage.SWITCH, current, commit)
        self._check_out(current, commit)
        self.record.unlink()

    def _current_commit(self) -> str:
        """The commit that the files are of, once a killed run's leftovers are dealt with.

        Returns:
            Its id; empty in a first clone.

        Raises:
            _Damaged: HEAD names no commit, and this is no first clone.
        """
        interrupted = self._recorded()
        if interrupted:
            self._resume(interrupted)
        head = self._head()
        in_first_clone = interrupted is not None and not interrupted.came_from
        if not head and not in_first_clone:
            self._git("rev-parse", "--git-dir")  # fails with git's own reason, where it has one
            raise _Damaged("HEAD names no commit")
        return head

    def _resume(self, move: _Move) -> None:
        """Deal with what a killed run left: git's locks, and files that were half written."""
        self._remove_locks()
        half_written = (
            move.stage is _Stage.SWITCH
            and self._has(move.goes_to)
            and (not self._head() or bool(self._local_changes()))
        )
        if half_written:
            if move.came_from:
                self._refuse_other_changes(move)
            self._git("checkout", "--quiet", "--detach", "--force", move.goes_to)
        if self._has("HEAD"):
            self.record.unlink()

    def _refuse_other_changes(self, move: _Move) -> None:
        """Refuse to overwrite changes that the interrupted switch cannot have made."""
        switched = set(self._git("diff", "--name-only", "-z", move.came_from, move.goes_to).split("\0"))
        if others := [name for name in self._local_changes() if name not in switched]:
            raise UsageError(
                f"{self.path}: a switch to {move.goes_to} was interrupted, and these other files were "
                f"changed, too: {', '.join(others[:10])}",
                "save them elsewhere, `git checkout -- <file>` each, then run the same command again",
            )

    def _remove_locks(self) -> None:
        """This run holds the home, so nobody else is at work here: a lock is a killed run's."""
        for directory in {git.repository(self.path), git.repository(self.home.root)}:
            for lock in (*directory.glob("*.lock"), *(directory / "refs").rglob("*.lock")):
                lock.unlink()

    def _refuse_other_projects(self) -> None:
        """A repository that was there before has to be one of kohya_ss, old or new."""
        if self.made_here.exists() or self._git("ls-tree", "HEAD", "--", SUBMODULE, "kohya_gui.py"):
            return
        raise UsageError(
            f"{self.path} is a git repository, but not of kohya_ss",
            "choose another directory with KOHYA_HOME",
        )

    def _changes_refused(self, changed: list[str]) -> UsageError:
        listed = join_some(changed, 20, "\n    ")
        return UsageError(
            f"{self.path} has local changes:\n    {listed}",
            "`invoke clone --stash` puts them away with git stash; commit them to keep them, or revert them",
        )

    def _stash(self, count: int) -> None:
        self._git("stash", "push", "--quiet", "--message", "put away by kohya-mps")
        pop = shlex.join(["git", "-C", str(self.path), "stash", "pop"])
        say(f"  put away {count} changed file(s): `{pop}` restores them")

    def _keep_on_branch(self, current: str) -> None:
        """Name a commit of the user's that is on no branch; it would be hard to find again."""
        if current and not self._git("for-each-ref", "--count=1", "--contains", current).strip():
            branch = f"kept-{current[:12]}"
            self._git("branch", "--force", branch, current)
            say(f"  {self.path}: the commit {current[:12]} was on no branch; it is now on {branch}")

    def _check_out(self, current: str, commit: str) -> None:
        """Change the files; a first clone overwrites what a killed one left."""
        done = self._run("checkout", "--quiet", "--detach", *([] if current else ["--force"]), commit)
        if done.returncode == 0:
            return
        git.check_disk_full(done.stderr)
        self._check_intact()
        if current and not self._local_changes():
            self.record.unlink()  # git saw the obstacle before it changed anything
        raise UsageError(
            f"git cannot switch {self.path} to {commit}:\n{done.stderr.strip()}",
            "move the files that it names away, then run the same command again",
        )

    # -- Fetching -------------------------------------------------------------------------------

    def _fetch(self, commit: str) -> None:
        """Fetch this commit alone where the server allows it; else all branches and tags."""
        url = self.url()
        if self._run("remote", "get-url", "origin").returncode:
            self._git("remote", "add", "origin", url)
        say(f"  fetching {commit[:12]} from {without_secret(url)}")
        shallow = (git.repository(self.path) / "shallow").exists()
        # A complete clone of the user's must not become a shallow one.
        depth = [] if self._has("HEAD") and not shallow else ["--depth", "1"]
        one = self._download(*depth, url, commit)
        if one.returncode == 0 and self._has(commit):
            return
        if one.stalled:
            raise self._unreachable(url, one)
        git.check_disk_full(one.tail)
        self._check_intact()
        say("  the server does not give that commit alone: fetching all branches and tags")
        self._fetch_everything(url)
        if not self._has(commit):
            raise UsageError(
                f"{without_secret(url)} has no commit {commit}",
                "check KOHYA_COMMIT and KOHYA_REPO_URL: is it in that repository?",
            )

    def _fetch_everything(self, url: str) -> None:
        shallow = (git.repository(self.path) / "shallow").exists()
        refs = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]
        done = self._download(*(["--unshallow"] if shallow else []), url, *refs)
        if done.returncode and shallow:
            done = self._download(url, *refs)
        if done.returncode:
            raise self._unreachable(url, done)

    def _download(self, *arguments: str) -> ProcessResult:
        # A submodule's URL comes from the repository, not from the user: git's own
        # protocol.*.allow rules for such URLs apply (GIT_PROTOCOL_FROM_USER).
        untrusted = {"GIT_PROTOCOL_FROM_USER": "0"} if self.is_submodule else {}
        fetch = ["-c", "gc.auto=0", "fetch", "--progress", "--no-tags", "--no-recurse-submodules"]
        return stream(
            [*git.command(self.path), *fetch, *arguments],
            env=git.environment(self.path) | untrusted,
            stall_seconds=self.stall_seconds,
        )

    def _unreachable(self, url: str, fetch: ProcessResult) -> StepFailed:
        git.check_disk_full(fetch.tail)
        reason = f"it sent nothing for {self.stall_seconds:g} seconds" if fetch.stalled else fetch.last_line
        return StepFailed(
            f"{without_secret(url)} cannot be fetched: {reason}",
            "check the network, or name a mirror or a local copy with KOHYA_REPO_URL "
            "(submodules: git config url.<base>.insteadOf)",
        )

    # -- Damage: RENEW -> (none) ----------------------------------------------------------------

    def _replace_damaged_repository(self, reason: str, commit: str) -> None:
        """Set a damaged repository aside and make a new one; it may hold the user's commits.

        The files stay. The new repository's HEAD is the commit that they came from, where
        that can still be read, so that what the user changed shows as changed.
        """
        repository, move = self.path / ".git", self._recorded()
        head = git.read_head(self.path)
        if move and move.stage is not _Stage.RENEW and not move.came_from and not head:
            shutil.rmtree(repository)  # ours alone: a first clone that was killed before it held a commit
            self._init(commit)
            return
        aside = _first_free(self.path, ".git.damaged")
        say(
            f"  {self.path}: its repository is damaged ({reason}); it is kept as {aside.name}, a new one is made"
        )
        came_from = head or (move.came_from if move else "")
        self._enter(_Stage.RENEW, came_from, "")
        repository.rename(aside)
        if (aside / "modules").is_dir():  # the submodule's repository, in a user's own clone
            repository.mkdir()
            (aside / "modules").rename(repository / "modules")
        self._renew(came_from, commit)

    def _renew(self, came_from: str, commit: str) -> None:
        """Make a new repository under the files, with HEAD at the commit that they came from."""
        self._git("init", "--quiet")
        self._remove_locks()
        self._exclude("/.git.damaged*")
        if not self.is_submodule:
            self._exclude(f"/{STATE}/")
        head = came_from or commit
        try:
            self._fetch(head)
        except KohyaError:
            if not came_from:
                raise
            head = commit
            self._fetch(head)
        self._git("update-ref", "--no-deref", "HEAD", head)
        self._git("reset", "--quiet")
        self.record.unlink()

    # -- The record, and git --------------------------------------------------------------------

    def _enter(self, stage: _Stage, came_from: str, goes_to: str) -> None:
        write_atomic(self.record, msgspec.json.encode(_Move(stage, came_from, goes_to)))

    def _recorded(self) -> _Move | None:
        try:
            return msgspec.json.decode(self.record.read_bytes(), type=_Move)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            return _Move(_Stage.RENEW, "", "")  # the disk lost it: the stage that touches no file

    def _exclude(self, pattern: str) -> None:
        """Hide what is ours, or was set aside, from ``git status`` and ``git clean``."""
        exclude = git.repository(self.path) / "info" / "exclude"
        known = exclude.read_bytes() if exclude.exists() else b""
        if pattern.encode() not in known.splitlines():
            exclude.parent.mkdir(exist_ok=True)
            write_atomic(exclude, known.rstrip() + f"\n{pattern}\n".encode())

    def _has(self, commit: str) -> bool:
        return self._run("cat-file", "-e", f"{commit}^{{tree}}").returncode == 0

    def _head(self) -> str:
        return self._run("rev-parse", "--verify", "--quiet", "HEAD^{commit}").stdout.strip()

    def _local_changes(self) -> list[str]:
        try:
            return local_changes(self.path)
        except StepFailed:
            self._check_intact()
            raise

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return git.run(self.path, *arguments)

    def _git(self, *arguments: str) -> str:
        done = self._run(*arguments)
        if done.returncode:
            git.check_disk_full(done.stderr)
            self._check_intact()
            raise git.failure(self.path, arguments[0], done.stderr)
        return done.stdout

    def _check_intact(self) -> None:
        """After git failed: was it because its repository is damaged?

        Raises:
            _Damaged: git's own check says so.
        """
        fsck = self._run("fsck", "--full", "--no-dangling", "--no-progress")
        if fsck.returncode and "dubious ownership" not in fsck.stderr:
            lines = (fsck.stderr + fsck.stdout).strip().splitlines()
            raise _Damaged(lines[0] if lines else "git fsck failed")


def _first_free(directory: Path, name: str) -> Path:
    names = [name, *(f"{name}.{n}" for n in range(2, 1000))]
    return next(directory / n for n in names if not os.path.lexists(directory / n))
