"""The checkout: kohya_ss at its pinned commit, sd-scripts at that commit's gitlink.

Both are brought to their commit by the same step, which can be killed at any moment:
before the first file changes it records where it comes from and where it goes, and only
files that differ between the two are ever taken for leftovers of an interrupted run.
"""

from __future__ import annotations

import os
import re
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
from kohya_mps.core.process import ProcessResult, capture, clean_environ, stream
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import check_unused, exclusive_lock
from kohya_mps.core.settings import GUI_PRESETS, Settings, without_secret
from kohya_mps.core.text import join_some

SUBMODULE = "sd-scripts"
_REF = "refs/kohya-mps/"
MADE_HERE = "checkout-made-here"


class Commits(msgspec.Struct, frozen=True):
    """What is checked out: kohya_ss and its sd-scripts."""

    kohya_ss: str
    sd_scripts: str


def ensure_checkout(settings: Settings, *, stash: bool = False) -> Commits:
    """Make the checkout stand at the pinned commit, whatever state it is found in.

    Args:
        settings: the home, the repository and the commit.
        stash: put local changes away with ``git stash`` instead of refusing them.

    Raises:
        UsageError: the place or the commit cannot be meant, or local changes are in the way.
        Busy: the checkout stands elsewhere, and a training runs from it.
        StepFailed: the repository cannot be reached, or git failed.
    """
    home = Installation(settings.home)
    kohya_ss = _Tree(home, home.root, settings, lambda: settings.url)
    sd_scripts = _Tree(home, home.sd_scripts, settings, lambda: _submodule_url(home))
    for tree in (kohya_ss, sd_scripts):
        tree.mend_config()
    kohya_ss.bring(settings.commit, stash)
    wanted = gitlink(home, settings.commit)
    sd_scripts.bring(wanted, stash)
    return Commits(settings.commit, wanted)


def clone(settings: Settings, *, stash: bool = False) -> Report:
    """``invoke clone``: bring the checkout to its commit, and say what stands where."""
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
    """The commits that stand in the home now; nothing when there is no usable checkout."""
    heads = []
    for tree in (home.root, home.sd_scripts):
        if not os.path.lexists(tree / ".git"):
            return None
        found = capture([*_command(tree), "rev-parse", "--verify", "--quiet", "HEAD"], env=_environment(tree))
        heads.append(found.stdout.strip())
    return Commits(*heads) if all(heads) else None


def local_changes(path: Path) -> list[str]:
    """Tracked files of one working tree that differ from its commit, as ``git status`` names them."""
    return _status(path, "--untracked-files=no")


def _status(path: Path, *flags: str) -> list[str]:
    # Without renames each entry is one path.
    how = ("--porcelain=v1", "-z", "--no-renames", "--ignore-submodules=all")
    return [entry[3:] for entry in _git(path, "status", *how, *flags).split("\0") if entry]


def made_here(home: Installation) -> bool:
    """Whether this project made the checkout; one that was there before is the user's."""
    return (home.state / MADE_HERE).exists()


def user_files(home: Installation) -> list[str]:
    """What a checkout holds besides the commit's own files: the user's, as far as can be told.

    Changed files, files that git does not track (models, outputs, datasets, ignored ones
    too), stashes, branches, and repositories that were set aside. Compiled Python does not
    count. Paths are relative to the checkout.
    """
    found = []
    for tree, prefix in ((home.root, ""), (home.sd_scripts, f"{SUBMODULE}/")):
        if not os.path.lexists(tree / ".git"):
            continue
        flags = ("--ignored", "--untracked-files=all")
        entries = _status(tree, *flags)
        found += [prefix + entry for entry in entries if not (_derived(entry) or _our_preset(tree / entry))]
        found += [f"{prefix}stash: {line}" for line in _git(tree, "stash", "list").splitlines()]
        branches = _git(tree, "for-each-ref", "--format=%(refname:short)", "refs/heads").splitlines()
        found += [f"{prefix}branch: {name}" for name in branches]
    return found


def _derived(entry: str) -> bool:
    return (
        "__pycache__/" in entry
        # setup.log is what kohya's page says of its starts.
        or entry.rstrip("/") in ("venv", STATE, SUBMODULE, "setup.log")
        or entry.startswith(f"{STATE}/")
    )


def _our_preset(path: Path) -> bool:
    """Whether this is a link that ``invoke gui`` put among the presets of kohya's page."""
    return path.is_symlink() and path.resolve().parent == GUI_PRESETS


def was_interrupted(home: Installation) -> bool:
    """Whether a run was killed while it changed the checkout."""
    return any(home.state.glob("moving-*.json"))


def gitlink(home: Installation, commit: str) -> str:
    """The commit of sd-scripts that a commit of kohya_ss names."""
    entry = _git(home.root, "ls-tree", commit, "--", SUBMODULE).split()
    if len(entry) < 3 or entry[1] != "commit":
        raise UsageError(
            f"commit {commit} has no {SUBMODULE} submodule, so it is no commit of kohya_ss",
            "check KOHYA_REPO_URL and KOHYA_COMMIT",
        )
    return entry[2]


def _submodule_url(home: Installation) -> str:
    """What git itself makes of the address in .gitmodules, relative ones included."""
    _git(home.root, "submodule", "--quiet", "init", "--", SUBMODULE)
    _git(home.root, "submodule", "--quiet", "sync", "--", SUBMODULE)
    return _git(home.root, "config", "--get", f"submodule.{SUBMODULE}.url").strip()


class _Stage(StrEnum):
    FETCH = "fetch"
    SWITCH = "switch"
    RENEW = "renew"


class _Move(msgspec.Struct, frozen=True):
    """The record of a working tree on its way: it exists while git may change anything.

    Only in the stage SWITCH do files change, those that differ between the two commits. In
    the stage RENEW the repository is made anew below files that stay as they are.
    """

    stage: _Stage
    came_from: str
    goes_to: str


class _Damaged(Exception):
    """Git cannot read what it once wrote to this disk."""


class _Tree:
    """One working tree on its way to a commit."""

    def __init__(self, home: Installation, path: Path, settings: Settings, url: Callable[[], str]) -> None:
        self.home = home
        self.path = path
        self.stall_seconds = settings.network_stall_seconds
        self.url = url
        self.is_submodule = path == home.sd_scripts
        self.made_here = home.state / MADE_HERE
        self.record = home.state / "moving-sd-scripts.json" if self.is_submodule else home.checkout_move

    def mend_config(self) -> None:
        """Set a configuration aside that git cannot read: it stops all of git, around a submodule, too."""
        config = _repository(self.path) / "config"
        if not config.is_file():
            return
        read = [*_command(config.parent), "config", "--file", str(config), "--list"]
        if capture(read, env=_environment(self.path)).returncode:
            aside = _first_free(config.parent, "config.damaged")
            say(f"  {config} is damaged; it is kept as {aside.name}, a new one is made")
            config.rename(aside)
            self._run("init", "--quiet")

    def bring(self, commit: str, stash: bool) -> None:
        try:
            if (move := self._recorded()) and move.stage is _Stage.RENEW:
                self._renew(move.came_from, commit)
            if not os.path.lexists(self.path / ".git"):
                self._begin(commit)
            self._move(commit, stash)
        except _Damaged as reason:
            self._start_over(str(reason), commit)
            self._move(commit, stash)
        if not self.is_submodule:
            self._exclude(f"/{STATE}/")

    def _exclude(self, pattern: str) -> None:
        """Keep what is ours, or was set aside, out of git's sight and away from ``git clean``."""
        exclude = _repository(self.path) / "info" / "exclude"
        known = exclude.read_bytes() if exclude.exists() else b""
        if pattern.encode() not in known.splitlines():
            exclude.parent.mkdir(exist_ok=True)
            write_atomic(exclude, known.rstrip() + f"\n{pattern}\n".encode())

    def _begin(self, commit: str) -> None:
        strangers = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if self.is_submodule and strangers and not self.record.exists():
            raise UsageError(
                f"{self.path} holds files but is no git working tree: {', '.join(strangers[:5])}",
                f"move it away, for instance `{shlex.join(['mv', str(self.path), f'{self.path}.old'])}`",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._note(_Stage.FETCH, "", commit)
        if not self.is_submodule:
            write_atomic(self.made_here, b"")
        self._git("init", "--quiet")

    def _note(self, stage: _Stage, came_from: str, goes_to: str) -> None:
        write_atomic(self.record, msgspec.json.encode(_Move(stage, came_from, goes_to)))

    def _recorded(self) -> _Move | None:
        try:
            return msgspec.json.decode(self.record.read_bytes(), type=_Move)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError:
            return _Move(_Stage.RENEW, "", "")  # the disk lost it: the stage that touches no file

    def _move(self, commit: str, stash: bool) -> None:
        interrupted = self._recorded()
        if interrupted:
            self._finish(interrupted)
        here = self._run("rev-parse", "--verify", "--quiet", "HEAD^{commit}").stdout.strip()
        if not here and not (interrupted and not interrupted.came_from):
            self._git("rev-parse", "--git-dir")
            raise _Damaged("HEAD names no commit")
        if here not in ("", commit) and not self.is_submodule:
            self._refuse_other_projects()
        if here and not (_repository(self.path) / "index").exists():
            self._git("reset", "--quiet")  # else every file counts as deleted and as unknown
        changed = self._local_changes() if here else []
        if changed and not stash:
            listed = join_some(changed, 20, "\n    ")
            raise UsageError(
                f"{self.path} has local changes:\n    {listed}",
                "`invoke clone --stash` puts them away with git stash; commit or revert them to keep or drop them",
            )
        if here == commit and not changed:
            return
        if here:
            check_unused(self.home, f"change the files of {self.path} under it")
        if changed:
            self._git("stash", "push", "--quiet", "--message", "put away by kohya-mps")
            say(
                f"  put away {len(changed)} changed file(s): `{self._shown('stash', 'pop')}` brings them back"
            )
        self._note(_Stage.FETCH, here, commit)
        if not self._has(commit):
            self._fetch(commit)
        self._keep(here)
        # git's clean-up must not lose it: rollback needs it
        self._git("update-ref", f"{_REF}{commit}", commit)
        self._note(_Stage.SWITCH, here, commit)
        switched = self._run("checkout", "--quiet", "--detach", *([] if here else ["--force"]), commit)
        if switched.returncode:
            _check_room(switched.stderr)
            self._check_whole()
            if here and not self._local_changes():
                self.record.unlink()  # git saw the obstacle before it changed anything
            raise UsageError(
                f"git cannot switch {self.path} to {commit}:\n{switched.stderr.strip()}",
                "move the files that it names away, then run the same command again",
            )
        self.record.unlink()

    def _finish(self, move: _Move) -> None:
        """A run was killed in here: drop its locks, and bring files it half wrote to their new state."""
        self._drop_locks()
        here = self._run("rev-parse", "--verify", "--quiet", "HEAD^{commit}").stdout.strip()
        if move.stage is _Stage.SWITCH and self._has(move.goes_to) and (not here or self._local_changes()):
            if move.came_from:
                moved = set(self._git("diff", "--name-only", "-z", move.came_from, move.goes_to).split("\0"))
                if foreign := [name for name in self._local_changes() if name not in moved]:
                    raise UsageError(
                        f"{self.path}: a switch to {move.goes_to} was interrupted, and these files were changed "
                        f"besides: {', '.join(foreign[:10])}",
                        "save them elsewhere, `git checkout -- <file>` each, then run the same command again",
                    )
            self._git("checkout", "--quiet", "--detach", "--force", move.goes_to)
        if self._has("HEAD"):
            self.record.unlink()

    def _drop_locks(self) -> None:
        """Nobody else is at work here, this run holds the home: a lock is a killed run's."""
        places = {_repository(self.path), _repository(self.home.root)}
        for place in places:
            for lock in (*place.glob("*.lock"), *(place / "refs").rglob("*.lock")):
                lock.unlink()

    def _refuse_other_projects(self) -> None:
        """A repository that was there before has to be one of kohya_ss, old or new."""
        if self.made_here.exists() or self._git("ls-tree", "HEAD", "--", SUBMODULE, "kohya_gui.py"):
            return
        raise UsageError(
            f"{self.path} is a git repository, but none of kohya_ss", "choose another place with KOHYA_HOME"
        )

    def _keep(self, here: str) -> None:
        """A commit of the user's that no branch holds would be lost from sight: name it."""
        if here and not self._git("for-each-ref", "--count=1", "--contains", here).strip():
            branch = f"kept-{here[:12]}"
            self._git("branch", "--force", branch, here)
            say(f"  {self.path}: the commit {here[:12]} was on no branch; it is now on {branch}")

    def _has(self, commit: str) -> bool:
        return self._run("cat-file", "-e", f"{commit}^{{tree}}").returncode == 0

    def _fetch(self, commit: str) -> None:
        """Only this commit where the server gives it by id; else all its branches and tags."""
        url = self.url()
        if self._run("remote", "get-url", "origin").returncode:
            self._git("remote", "add", "origin", url)
        say(f"  fetching {commit[:12]} from {without_secret(url)}")
        # A complete clone of the user's must not become a shallow one.
        is_complete = self._has("HEAD") and not (_repository(self.path) / "shallow").exists()
        one = self._download(*([] if is_complete else ["--depth", "1"]), url, commit)
        if one.returncode == 0 and self._has(commit):
            return
        if one.stalled:
            raise self._unreachable(url, one)
        _check_room(one.tail)
        self._check_whole()
        say("  that commit alone was not given: trying all branches and tags")
        shallow = ["--unshallow"] if (_repository(self.path) / "shallow").exists() else []
        refs = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"]
        everything = self._download(*shallow, url, *refs)
        if everything.returncode and shallow:
            everything = self._download(url, *refs)
        if everything.returncode:
            raise self._unreachable(url, everything)
        if not self._has(commit):
            raise UsageError(
                f"{without_secret(url)} has no commit {commit}",
                "check KOHYA_COMMIT and KOHYA_REPO_URL: is it in that repository?",
            )

    def _download(self, *arguments: str) -> ProcessResult:
        # A submodule's address comes from the repository, not from the user: git's own
        # protocol.*.allow rules for such addresses apply (GIT_PROTOCOL_FROM_USER).
        theirs = {"GIT_PROTOCOL_FROM_USER": "0"} if self.is_submodule else {}
        return stream(
            [
                *_command(self.path),
                "-c",
                "gc.auto=0",
                "fetch",
                "--progress",
                "--no-tags",
                "--no-recurse-submodules",
                *arguments,
            ],
            env=_environment(self.path) | theirs,
            stall_seconds=self.stall_seconds,
        )

    def _unreachable(self, url: str, finished: ProcessResult) -> StepFailed:
        _check_room(finished.tail)
        reason = (
            f"it sent nothing for {self.stall_seconds:g} seconds" if finished.stalled else finished.last_line
        )
        return StepFailed(
            f"{without_secret(url)} cannot be fetched: {reason}",
            "check the network, or name a mirror or a local copy with KOHYA_REPO_URL "
            "(submodules: git config url.<base>.insteadOf)",
        )

    def _start_over(self, reason: str, commit: str) -> None:
        """A damaged repository is set aside, never deleted: it may hold the user's commits.

        The files stay; the new repository stands at the commit they came from, as far as
        that can still be read, so that what the user changed shows as changed.
        """
        git, move = self.path / ".git", self._recorded()
        if move and move.stage is not _Stage.RENEW and not move.came_from and not _read_head(self.path):
            shutil.rmtree(git)  # ours alone: a first clone that was killed before anything stood there
            self._begin(commit)
            return
        aside = _first_free(self.path, ".git.damaged")
        say(
            f"  {self.path}: its repository is damaged ({reason}); it is kept as {aside.name}, a new one is made"
        )
        came_from = _read_head(self.path) or (move.came_from if move else "")
        self._note(_Stage.RENEW, came_from, "")
        git.rename(aside)
        if (aside / "modules").is_dir():  # the submodule's repository, in a user's own clone
            git.mkdir()
            (aside / "modules").rename(git / "modules")
        self._renew(came_from, commit)

    def _renew(self, came_from: str, commit: str) -> None:
        self._git("init", "--quiet")
        self._drop_locks()
        self._exclude("/.git.damaged*")
        if not self.is_submodule:
            self._exclude(f"/{STATE}/")
        try:
            self._fetch(came_from or commit)
        except KohyaError:
            if not came_from:
                raise
            came_from = ""
            self._fetch(commit)
        self._git("update-ref", "--no-deref", "HEAD", came_from or commit)
        self._git("reset", "--quiet")
        self.record.unlink()

    def _local_changes(self) -> list[str]:
        try:
            return local_changes(self.path)
        except StepFailed:
            self._check_whole()
            raise

    def _shown(self, *arguments: str) -> str:
        """A git command as the user types it."""
        return shlex.join(["git", "-C", str(self.path), *arguments])

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return capture([*_command(self.path), *arguments], env=_environment(self.path))

    def _git(self, *arguments: str) -> str:
        done = self._run(*arguments)
        if done.returncode:
            _check_room(done.stderr)
            self._check_whole()
            raise StepFailed(f"git {arguments[0]} failed in {self.path}: {done.stderr.strip()}")
        return done.stdout

    def _check_whole(self) -> None:
        """After git failed: was it because its repository is damaged?

        Raises:
            _Damaged: git's own check says so.
        """
        checked = self._run("fsck", "--full", "--no-dangling", "--no-progress")
        if checked.returncode and "dubious ownership" not in checked.stderr:
            words = (checked.stderr + checked.stdout).strip().splitlines()
            raise _Damaged(words[0] if words else "git fsck failed")


def _repository(tree: Path) -> Path:
    """Where a working tree's repository is, found without git."""
    git = tree / ".git"
    if git.is_file():  # a submodule's, which `git clone --recurse-submodules` made
        named = git.read_text(encoding="utf-8", errors="replace").removeprefix("gitdir:")
        git = tree / named.strip().replace("\0", "")
    return git


def _read_head(tree: Path) -> str:
    """The commit that a repository stood at, read without git; empty when that cannot be told."""
    git = _repository(tree)
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            name = head.removeprefix("ref: ")
            if (git / name).is_file():
                head = (git / name).read_text(encoding="utf-8").strip()
            else:
                packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
                head = next((line.split()[0] for line in packed if line.endswith(f" {name}")), "")
    except (OSError, UnicodeDecodeError):
        return ""
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def _check_room(said: str) -> None:
    """Raise StepFailed when git says, in one of its ways, that the disk is full."""
    if "No space left" in said or "Out of diskspace" in said:
        last = said.strip().splitlines()[-1]
        raise StepFailed(f"the disk is full: {last}", "free some space, then run the same command again")


def _command(path: Path) -> list[str]:
    """The submodule is brought by a step of its own, whatever the user's configuration says."""
    return ["git", "-C", str(path), "-c", "submodule.recurse=false"]


def _environment(path: Path) -> dict[str, str]:
    """Git asks for no password in the middle of a set-up, answers in the language that is
    read here, never takes a repository further up for the one in ``path``, and does not
    lock the index only to look: killed then, it would leave the lock behind."""
    return clean_environ(
        extra={
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_CEILING_DIRECTORIES": str(path.resolve().parent),
            "LC_ALL": "C",
        }
    )


def _git(path: Path, *arguments: str) -> str:
    done = capture([*_command(path), *arguments], env=_environment(path))
    if done.returncode:
        raise StepFailed(f"git {arguments[0]} failed in {path}: {done.stderr.strip()}")
    return done.stdout


def _first_free(directory: Path, name: str) -> Path:
    names = [name, *(f"{name}.{n}" for n in range(2, 1000))]
    return next(directory / n for n in names if not os.path.lexists(directory / n))
