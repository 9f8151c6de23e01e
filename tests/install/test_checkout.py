from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import checkout
from kohya_mps.install.checkout import Commits, clone, ensure_checkout, local_changes, present
from tests.support.installs import Upstream, git, make_settings, make_upstream


@pytest.fixture
def settings(upstream: Upstream, tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "it's a $(home) é", url=str(upstream.kohya_ss), commit=upstream.commit)


def at(settings: Settings, commit: str) -> Settings:
    return msgspec.structs.replace(settings, commit=commit)


def from_url(settings: Settings, url: str) -> Settings:
    return msgspec.structs.replace(settings, url=url)


def check_is_good(settings: Settings, upstream: Upstream) -> None:
    """Both trees stand at the pin with every file as committed, and git finds nothing wrong."""
    home = Installation(settings.home)
    assert present(home) == Commits(upstream.commit, upstream.sd_scripts_commit)
    for tree in (home.root, home.sd_scripts):
        assert git(tree, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all") == ""
        git(tree, "fsck", "--no-dangling")
    assert (home.sd_scripts / "train_network.py").read_text() == "print('trainer')\n"
    assert (home.root / "docs" / "Größe 1.txt").is_file()
    assert not list(home.state.glob("moving-*"))
    ensure_checkout(settings)


def test_a_fresh_clone_has_both_trees_at_their_commits(settings: Settings, upstream: Upstream) -> None:
    report = clone(settings)
    assert report.ok
    assert [check.status for check in report.checks] == [Status.PASS, Status.PASS]
    check_is_good(settings, upstream)
    # Only what is needed was fetched, and what is ours is hidden from git.
    assert git(settings.home, "rev-list", "--count", "HEAD") == "1"
    assert git(settings.home, "status", "--porcelain") == ""


def test_a_second_run_changes_nothing_and_needs_no_network(settings: Settings) -> None:
    first = ensure_checkout(settings)
    before = {path: path.lstat().st_mtime_ns for path in settings.home.rglob("*") if ".git" not in path.parts}
    assert ensure_checkout(from_url(settings, "/nowhere")) == first
    after = {path: path.lstat().st_mtime_ns for path in settings.home.rglob("*") if ".git" not in path.parts}
    assert after == before


def test_from_a_server_that_gives_no_single_commits_everything_is_fetched(
    settings: Settings, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Protocol 0 gives the tips of branches alone; the old commit is no tip.
    (tmp_path / "gitconfig").write_text(
        '[protocol]\nversion = 0\n[protocol "file"]\nallow = always\n[user]\nname = x\nemail = x@y.invalid\n'
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    old = at(from_url(settings, f"file://{upstream.kohya_ss}"), upstream.old)
    assert ensure_checkout(old) == Commits(upstream.old, upstream.old_sd_scripts)
    # The other way round: everything is there already, and nothing is fetched.
    assert ensure_checkout(at(from_url(settings, "/nowhere"), upstream.commit)).kohya_ss == upstream.commit


def test_a_shallow_checkout_is_completed_where_the_server_gives_no_single_commits(
    settings: Settings, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ensure_checkout(settings)
    assert (settings.home / ".git" / "shallow").exists()
    (tmp_path / "gitconfig").write_text('[protocol]\nversion = 0\n[protocol "file"]\nallow = always\n')
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    assert ensure_checkout(at(settings, upstream.old)).kohya_ss == upstream.old


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_commit_that_the_repository_lacks_is_an_error(
    scheme: str, settings: Settings, upstream: Upstream
) -> None:
    url = f"{scheme}{upstream.kohya_ss}"
    with pytest.raises(UsageError, match="has no commit " + "d" * 40) as caught:
        ensure_checkout(at(from_url(settings, url), "d" * 40))
    assert "KOHYA_COMMIT" in caught.value.fix
    check_is_good_after(settings, upstream)


def check_is_good_after(settings: Settings, upstream: Upstream) -> None:
    """A failed run leaves nothing that the next one stumbles over."""
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_commit_of_another_project_is_refused(settings: Settings, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    (other / "file").write_text("")
    git(other, "add", "-A")
    git(other, "commit", "--quiet", "-m", "other")
    with pytest.raises(UsageError, match="no commit of kohya_ss"):
        ensure_checkout(at(from_url(settings, str(other)), git(other, "rev-parse", "HEAD")))


@pytest.mark.parametrize(
    "url", ["/no/such/place", "https://127.0.0.1:9/kohya_ss.git", "no-such-scheme://x/y"]
)
def test_an_address_that_does_not_answer_is_an_error_that_names_it(
    url: str, settings: Settings, upstream: Upstream
) -> None:
    with pytest.raises(StepFailed, match="cannot be fetched") as caught:
        ensure_checkout(from_url(settings, url))
    assert url in caught.value.what
    assert "KOHYA_REPO_URL" in caught.value.fix
    check_is_good_after(settings, upstream)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            try:
                while True:
                    taken.append(server.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield f"git://127.0.0.1:{server.getsockname()[1]}/kohya_ss.git"
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in taken:
            connection.close()


def test_a_server_that_stops_answering_is_given_up(
    settings: Settings, upstream: Upstream, silent_server: str
) -> None:
    started = time.monotonic()
    with pytest.raises(StepFailed, match="sent nothing for 1 seconds"):
        ensure_checkout(msgspec.structs.replace(settings, url=silent_server, network_stall_seconds=1.0))
    assert time.monotonic() - started < 10
    check_is_good_after(settings, upstream)


def test_the_submodules_address_follows_the_users_insteadof(
    tmp_path: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = make_upstream(tmp_path / "up", "https://hub.invalid/sd-scripts")
    config = (machine / "gitconfig").read_text()
    config += f'[url "{tmp_path}/up/"]\n\tinsteadOf = https://hub.invalid/\n'
    (tmp_path / "gitconfig").write_text(config)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    settings = make_settings(tmp_path / "home", url="https://hub.invalid/kohya_ss", commit=there.commit)
    ensure_checkout(settings)
    check_is_good(settings, there)


@pytest.mark.parametrize("address", ["../sd-scripts", "../sd-scripts/"])
def test_a_relative_address_of_the_submodule_is_taken_from_the_repositorys(
    address: str, tmp_path: Path
) -> None:
    there = make_upstream(tmp_path / "up", address)
    settings = make_settings(tmp_path / "home", url=str(there.kohya_ss), commit=there.commit)
    ensure_checkout(settings)
    check_is_good(settings, there)


def test_a_submodule_from_a_local_path_needs_the_users_consent_as_git_wants_it(
    settings: Settings, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Path
) -> None:
    (tmp_path / "gitconfig").write_text("[user]\nname = x\nemail = x@y.invalid\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    with pytest.raises(StepFailed, match="transport 'file' not allowed"):
        ensure_checkout(settings)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "protocol.file.allow")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "always")
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_clean_checkout_is_moved_to_another_pin_and_back(settings: Settings, upstream: Upstream) -> None:
    assert ensure_checkout(at(settings, upstream.old)) == Commits(upstream.old, upstream.old_sd_scripts)
    assert (settings.home / "dropped.txt").exists()
    ensure_checkout(settings)
    check_is_good(settings, upstream)
    assert not (settings.home / "dropped.txt").exists()
    # Rollback needs the commits that were checked out before, without a network.
    git(settings.home, "gc", "--quiet", "--prune=now")
    assert ensure_checkout(at(from_url(settings, "/nowhere"), upstream.old)).kohya_ss == upstream.old


def test_local_changes_are_refused_with_their_names_and_left_as_they_are(
    settings: Settings, upstream: Upstream
) -> None:
    ensure_checkout(at(settings, upstream.old))
    (settings.home / "kohya_gui.py").write_text("mine\n")
    (settings.home / "stays.txt").unlink()
    git(settings.home, "mv", "dropped.txt", "a renamed file.txt")
    with pytest.raises(UsageError) as caught:
        ensure_checkout(settings)
    for name in ("kohya_gui.py", "stays.txt", "dropped.txt", "a renamed file.txt"):
        assert f"    {name}\n" in caught.value.what + "\n"
    assert "--stash" in caught.value.fix
    assert (settings.home / "kohya_gui.py").read_text() == "mine\n"
    assert present(Installation(settings.home)) == Commits(upstream.old, upstream.old_sd_scripts)


def test_many_local_changes_are_counted(settings: Settings, upstream: Upstream, tmp_path: Path) -> None:
    ensure_checkout(settings)
    for n in range(25):
        (settings.home / f"{n:02}.txt").write_text("")
    git(settings.home, "add", "-A", ":!sd-scripts")
    with pytest.raises(UsageError, match="and 5 more"):
        ensure_checkout(settings)


def test_local_changes_of_either_tree_are_stashed_on_request(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    sd_scripts = Installation(settings.home).sd_scripts
    (settings.home / "kohya_gui.py").write_text("mine\n")
    (sd_scripts / "train_network.py").write_text("mine too\n")
    ensure_checkout(settings, stash=True)
    check_is_good(settings, upstream)
    for tree, name, text in (
        (settings.home, "kohya_gui.py", "mine"),
        (sd_scripts, "train_network.py", "mine too"),
    ):
        assert "put away by kohya-mps" in git(tree, "stash", "list")
        assert git(tree, "show", f"stash@{{0}}:{name}") == text


def test_changes_are_put_away_for_a_user_without_a_name(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ensure_checkout(settings)
    (settings.home / "kohya_gui.py").write_text("mine\n")
    (tmp_path / "gitconfig").write_text("[user]\nuseConfigOnly = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    ensure_checkout(settings, stash=True)
    assert git(settings.home, "show", "stash@{0}:kohya_gui.py") == "mine"


def test_untracked_and_ignored_files_survive_a_move(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    kept = [
        settings.home / "my lora.safetensors",
        settings.home / "venv" / "file",
        Installation(settings.home).sd_scripts / "mine",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    ensure_checkout(settings, stash=True)
    assert all(path.read_text() == "mine" for path in kept)


def test_an_untracked_file_in_the_way_is_named_and_kept(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    (settings.home / "docs").mkdir()
    mine = settings.home / "docs" / "Größe 1.txt"
    mine.write_text("mine\n")
    with pytest.raises(UsageError, match="cannot switch"):
        ensure_checkout(settings)
    assert mine.read_text() == "mine\n"
    mine.rename(settings.home / "mine.txt")
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_commit_of_the_users_that_no_branch_holds_gets_one(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    (settings.home / "mine.txt").write_text("mine\n")
    git(settings.home, "add", "mine.txt")
    git(settings.home, "commit", "--quiet", "-m", "my work")
    mine = git(settings.home, "rev-parse", "HEAD")
    ensure_checkout(settings)
    check_is_good(settings, upstream)
    assert git(settings.home, "rev-parse", f"kept-{mine[:12]}") == mine


def test_the_pins_own_commits_get_no_branch(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    ensure_checkout(settings)
    assert git(settings.home, "branch", "--list", "kept-*") == ""


def user_clone(upstream: Upstream, home: Path, commit: str) -> None:
    subprocess.run(
        ["git", "clone", "--quiet", "--recurse-submodules", upstream.kohya_ss, home],
        check=True,
        capture_output=True,
    )
    git(home, "checkout", "--quiet", "-B", "mine", commit)
    git(home, "submodule", "--quiet", "update")


def test_a_users_own_clone_is_taken_over_with_its_branches_and_history(
    settings: Settings, upstream: Upstream
) -> None:
    user_clone(upstream, settings.home, upstream.old)
    assert (Installation(settings.home).sd_scripts / ".git").is_file()
    ensure_checkout(settings)
    check_is_good(settings, upstream)
    assert git(settings.home, "rev-parse", "mine") == upstream.old
    assert git(settings.home, "rev-list", "--count", "main") == "2"


def test_a_users_complete_clone_does_not_become_a_shallow_one(tmp_path: Path) -> None:
    there = make_upstream(tmp_path / "up")
    home = tmp_path / "home"
    user_clone(there, home, there.old)
    (there.kohya_ss / "later.txt").write_text("")
    git(there.kohya_ss, "add", "later.txt")
    git(there.kohya_ss, "commit", "--quiet", "-m", "later")
    later = git(there.kohya_ss, "rev-parse", "HEAD")
    ensure_checkout(make_settings(home, url=str(there.kohya_ss), commit=later))
    assert git(home, "rev-list", "--count", "HEAD") == "3"
    assert not (home / ".git" / "shallow").exists()


def test_another_projects_repository_is_refused_and_left_alone(settings: Settings) -> None:
    settings.home.mkdir()
    git(settings.home, "init", "--quiet")
    (settings.home / "thesis.tex").write_text("mine")
    git(settings.home, "add", "-A")
    git(settings.home, "commit", "--quiet", "-m", "thesis")
    before = git(settings.home, "rev-parse", "HEAD")
    with pytest.raises(UsageError, match="not of kohya_ss"):
        ensure_checkout(settings, stash=True)
    assert git(settings.home, "rev-parse", "HEAD") == before
    assert (settings.home / "thesis.tex").read_text() == "mine"


def test_files_where_the_submodule_belongs_are_refused(settings: Settings) -> None:
    Installation(settings.home).sd_scripts.mkdir(parents=True)
    (Installation(settings.home).sd_scripts / "mine.py").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.py") as caught:
        ensure_checkout(settings)
    assert "mv " in caught.value.fix
    assert (Installation(settings.home).sd_scripts / "mine.py").read_text() == "mine"


def test_a_home_inside_another_repository_never_touches_that_one(upstream: Upstream, tmp_path: Path) -> None:
    outer = tmp_path / "dotfiles"
    outer.mkdir()
    git(outer, "init", "--quiet")
    (outer / "file").write_text("mine")
    git(outer, "add", "-A")
    git(outer, "commit", "--quiet", "-m", "outer")
    settings = make_settings(outer / "tools" / "home", url=str(upstream.kohya_ss), commit=upstream.commit)

    def state() -> str:
        return (
            git(outer, "for-each-ref")
            + git(outer, "rev-parse", "HEAD")
            + (outer / ".git" / "config").read_text()
        )

    before = state()
    ensure_checkout(settings)
    check_is_good(settings, upstream)
    shutil.rmtree(settings.home / "sd-scripts" / ".git")
    (settings.home / ".git" / "HEAD").unlink()
    with pytest.raises(UsageError, match="holds files but is no git working tree"):
        ensure_checkout(settings)
    assert state() == before


def test_the_users_active_repository_is_hidden_from_git(
    settings: Settings, upstream: Upstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    ensure_checkout(settings)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name)
    check_is_good(settings, upstream)


def test_the_commits_are_none_where_there_is_no_whole_checkout(
    settings: Settings, upstream: Upstream
) -> None:
    home = Installation(settings.home)
    assert present(home) is None
    ensure_checkout(settings)
    assert present(home) == Commits(upstream.commit, upstream.sd_scripts_commit)
    shutil.rmtree(home.sd_scripts)
    assert present(home) is None
    ensure_checkout(settings)
    check_is_good(settings, upstream)


# -- Damage ---------------------------------------------------------------------------------


def zero(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()  # a local clone shares its objects with the repository it came from
    path.write_bytes(bytes(size))


def zero_every_object(repository: Path) -> None:
    for path in (repository / "objects").rglob("*"):
        if path.is_file():
            zero(path)


def delete_every_object(repository: Path) -> None:
    for path in [p for p in (repository / "objects").rglob("*") if p.is_file()]:
        path.unlink()


def fill_exclude_with_noise(repository: Path) -> None:
    (repository / "info").mkdir(exist_ok=True)
    (repository / "info" / "exclude").write_bytes(b"\xc0\xff\x00" * 20)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "objects full of zeros": zero_every_object,
    "deleted objects": delete_every_object,
    "no HEAD": lambda repository: (repository / "HEAD").unlink(),
    "an empty HEAD": lambda repository: (repository / "HEAD").write_text(""),
    "a HEAD of zeros": lambda repository: zero(repository / "HEAD"),
    "a HEAD that names nothing": lambda repository: (repository / "HEAD").write_text(
        "ref: refs/heads/gone\n"
    ),
    "a truncated index": lambda repository: os.truncate(repository / "index", 20),
}

# One of each kind; the slow tests try the rest, and the second repository, which is as the first.
OF_EACH_KIND = ("deleted objects", "no HEAD", "a truncated index")
EVERY_DAMAGE = [
    what if what in OF_EACH_KIND else pytest.param(what, marks=pytest.mark.slow) for what in DAMAGES
]
TREES = ["kohya_ss", pytest.param("sd-scripts", marks=pytest.mark.slow)]

# Mended where they are: nothing of these files has to be fetched.
SLIGHT_DAMAGES: dict[str, Callable[[Path], object]] = {
    "a config of zeros": lambda repository: zero(repository / "config"),
    "an unfinished line in config": lambda repository: (repository / "config").write_text("[core\n"),
    "no config": lambda repository: (repository / "config").unlink(),
    "no index": lambda repository: (repository / "index").unlink(),
    "info/exclude full of noise": fill_exclude_with_noise,
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("what", EVERY_DAMAGE)
def test_a_damaged_repository_is_replaced_and_the_old_one_kept(
    what: str, tree: str, settings: Settings, upstream: Upstream
) -> None:
    ensure_checkout(at(settings, upstream.old))
    path = settings.home if tree == "kohya_ss" else Installation(settings.home).sd_scripts
    (path / "untracked.safetensors").write_text("mine")
    DAMAGES[what](path / ".git")
    try:
        ensure_checkout(settings)
    except UsageError as refused:
        # Where HEAD is lost nobody can tell the old commit's files from the user's changes.
        assert "HEAD" in what
        assert "has local changes" in refused.what
        ensure_checkout(settings, stash=True)
    check_is_good(settings, upstream)
    assert (path / "untracked.safetensors").read_text() == "mine"
    assert (path / ".git.damaged").is_dir()
    assert ".git.damaged" not in git(path, "status", "--porcelain")


@pytest.mark.parametrize("what", EVERY_DAMAGE)
def test_what_the_user_changed_is_still_his_after_a_repair(
    what: str, settings: Settings, upstream: Upstream
) -> None:
    ensure_checkout(settings)
    (settings.home / "kohya_gui.py").write_text("mine\n")
    DAMAGES[what](settings.home / ".git")
    with pytest.raises(UsageError, match=r"local changes:\n    kohya_gui\.py"):
        ensure_checkout(settings)
    assert (settings.home / "kohya_gui.py").read_text() == "mine\n"
    assert (settings.home / ".git.damaged").exists()
    ensure_checkout(settings, stash=True)
    assert git(settings.home, "show", "stash@{0}:kohya_gui.py") == "mine"


@pytest.mark.parametrize("made_by", ["this project", pytest.param("the user", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("what", SLIGHT_DAMAGES)
def test_a_slightly_damaged_repository_is_mended_and_changes_are_still_the_users(
    what: str, tree: str, made_by: str, settings: Settings, upstream: Upstream
) -> None:
    if made_by == "the user":
        user_clone(upstream, settings.home, upstream.commit)
    ensure_checkout(settings)
    path = settings.home if tree == "kohya_ss" else Installation(settings.home).sd_scripts
    name = git(path, "ls-files", "*.py").split()[0]
    changed = path / name
    changed.write_text("mine\n")
    SLIGHT_DAMAGES[what](Path(git(path, "rev-parse", "--absolute-git-dir")))
    with pytest.raises(UsageError, match=rf"local changes:\n    {name}"):
        ensure_checkout(settings)
    assert changed.read_text() == "mine\n"
    ensure_checkout(settings, stash=True)
    check_is_good(settings, upstream)
    assert not list(settings.home.rglob(".git.damaged*"))


def test_a_second_damage_keeps_the_first_repository_too(settings: Settings, upstream: Upstream) -> None:
    for _ in range(2):
        ensure_checkout(settings)
        (settings.home / ".git" / "HEAD").unlink()
    ensure_checkout(settings)
    assert (settings.home / ".git.damaged.2").is_dir()
    check_is_good(settings, upstream)


def test_a_damaged_repository_is_not_replaced_while_there_is_no_network(
    settings: Settings, upstream: Upstream
) -> None:
    ensure_checkout(settings)
    (settings.home / "kohya_gui.py").write_text("mine\n")
    zero_every_object(settings.home / ".git")
    for _ in range(2):
        with pytest.raises(StepFailed, match="cannot be fetched"):
            ensure_checkout(from_url(settings, "/nowhere"))
    with pytest.raises(UsageError, match=r"kohya_gui\.py"):
        ensure_checkout(settings)
    assert (settings.home / "kohya_gui.py").read_text() == "mine\n"


def test_a_damaged_submodule_of_a_users_clone_keeps_where_it_stood(
    settings: Settings, upstream: Upstream
) -> None:
    user_clone(upstream, settings.home, upstream.old)
    zero_every_object(settings.home / ".git" / "modules" / "sd-scripts")
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_damaged_users_clone_with_packed_branches_keeps_where_it_stood(
    settings: Settings, upstream: Upstream
) -> None:
    user_clone(upstream, settings.home, upstream.old)
    git(settings.home, "gc", "--quiet")
    zero_every_object(settings.home / ".git")
    ensure_checkout(settings)
    check_is_good(settings, upstream)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a directory away")
def test_a_repository_of_another_user_is_an_error_with_gits_own_message(settings: Settings) -> None:
    ensure_checkout(settings)
    for path in (settings.home, settings.home / ".git"):
        os.chown(path, 12345, -1)
    with pytest.raises(StepFailed, match=r"safe\.directory"):
        ensure_checkout(settings)
    assert not (settings.home / ".git.damaged").exists()


# -- Kills ----------------------------------------------------------------------------------

# Stands before git on PATH: kills the program that called it at the given call, before git
# works or after; `half` leaves what a git that was killed itself would leave.
SHIM = """\
#!/bin/sh
n=$(($(cat "$KILL_DIR/count") + 1)); echo $n > "$KILL_DIR/count"; echo "$*" >> "$KILL_DIR/calls"
if [ "$n" = "$KILL_AT" ]; then
    case "$KILL_HOW" in
        after) "{git}" "$@" ;;
        half) {half} ;;
    esac
    kill -9 $PPID
    exit 137
fi
exec "{git}" "$@"
"""
# What each command leaves when it is killed itself: its lock, and files written half.
HALF = """\
case "$*" in
    *" remote add "*|*" submodule "*) : > "$2/.git/config.lock" ;;
    *" fetch "*) : > "$2/.git/shallow.lock" ;;
    *" update-ref "*) mkdir -p "$2/.git/refs/kohya-mps"; : > "$2/.git/refs/kohya-mps/$KILL_COMMIT.lock" ;;
    *" checkout "*)
        : > "$2/.git/index.lock"
        [ -e "$2/kohya_gui.py" ] && printf ne > "$2/kohya_gui.py"
        [ -e "$2/train_network.py" ] && printf pri > "$2/train_network.py" ;;
esac"""
# The calls of git that change something: a kill between two others is a kill after one of these.
CHANGING = (
    " init ",
    " remote add ",
    " fetch ",
    " update-ref ",
    " checkout ",
    " submodule ",
    " stash ",
    " reset ",
)


class Killer:
    """Runs a step in a process of its own that is killed at one of its calls of git."""

    def __init__(self, directory: Path, commit: str) -> None:
        real = shutil.which("git")
        assert real
        self.directory = directory
        self.commit = commit
        directory.mkdir()
        (directory / "git").write_text(SHIM.format(git=os.path.realpath(real), half=HALF))
        (directory / "git").chmod(0o755)

    def run(self, settings: Settings, at_call: int, how: str, stash: bool = False) -> bool:
        """Whether the run was killed; a run with fewer calls ends by itself."""
        (self.directory / "count").write_text("0")
        (self.directory / "calls").write_text("")
        child = os.fork()
        if child == 0:
            os.environ |= {
                "PATH": f"{self.directory}:{os.environ['PATH']}", "KILL_DIR": str(self.directory),
                "KILL_AT": str(at_call), "KILL_HOW": how, "KILL_COMMIT": self.commit,
            }  # fmt: skip
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
            code = 1
            try:
                ensure_checkout(settings, stash=stash)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        return status != 0


def changing_calls(killer: Killer, settings: Settings, stash: bool = False) -> list[int]:
    """The numbers of the calls of git, in a run that is not killed, that change something."""
    assert not killer.run(settings, 0, "never", stash)
    calls = (killer.directory / "calls").read_text().splitlines()
    return [n for n, call in enumerate(calls, 1) if any(word in f"{call} " for word in CHANGING)]


@pytest.fixture
def killer(tmp_path: Path, upstream: Upstream) -> Killer:
    return Killer(tmp_path / "shim", upstream.commit)


@pytest.mark.slow
def test_a_fresh_clone_killed_anywhere_is_finished_by_the_next_run(
    settings: Settings, upstream: Upstream, killer: Killer
) -> None:
    numbers = changing_calls(killer, settings)
    assert len(numbers) >= 10
    check_is_good(settings, upstream)
    for number in numbers:
        shutil.rmtree(settings.home)
        assert killer.run(settings, number, "half")
        assert clone(settings).ok
        check_is_good(settings, upstream)


@pytest.mark.slow
def test_a_move_killed_anywhere_is_finished_by_the_next_run(
    settings: Settings, upstream: Upstream, tmp_path: Path, killer: Killer
) -> None:
    ensure_checkout(at(settings, upstream.old))
    model = settings.home.rename(tmp_path / "model")
    shutil.copytree(model, settings.home)
    numbers = changing_calls(killer, settings)
    assert len(numbers) >= 8
    for number in numbers:
        for how in ("half", "after"):
            shutil.rmtree(settings.home)
            shutil.copytree(model, settings.home)
            assert killer.run(settings, number, how)
            assert clone(settings).ok
            check_is_good(settings, upstream)


@pytest.mark.parametrize(
    "missing",
    ["HEAD", *(pytest.param(name, marks=pytest.mark.slow) for name in ("refs", "objects", "config"))],
)
@pytest.mark.parametrize("tree", [".", pytest.param("sd-scripts", marks=pytest.mark.slow)])
def test_a_git_init_that_was_killed_itself_is_begun_again(
    tree: str, missing: str, settings: Settings, upstream: Upstream, killer: Killer
) -> None:
    assert not killer.run(settings, 0, "never")
    calls = (killer.directory / "calls").read_text().splitlines()
    shutil.rmtree(settings.home)
    numbers = [
        n for n, call in enumerate(calls, 1) if " init " in f"{call} " and "submodule" not in call.split()
    ]
    assert killer.run(settings, numbers[tree != "."], "after")
    half = settings.home / tree / ".git"
    (half / "config.lock").touch()
    shutil.rmtree(half / missing) if (half / missing).is_dir() else (half / missing).unlink()
    assert clone(settings).ok
    check_is_good(settings, upstream)
    assert not list((settings.home / tree).glob(".git.damaged*"))


def spoil_head(home: Path) -> None:
    (home / ".git" / "HEAD").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [None, spoil_head])
def test_what_the_user_changed_survives_a_kill_anywhere(
    damage: Callable[[Path], None] | None,
    settings: Settings,
    upstream: Upstream,
    tmp_path: Path,
    killer: Killer,
) -> None:
    ensure_checkout(at(settings, upstream.commit if damage else upstream.old))
    (settings.home / "kohya_gui.py").write_text("mine\n")
    if damage:
        damage(settings.home)
    model = settings.home.rename(tmp_path / "model")
    shutil.copytree(model, settings.home)
    for number in changing_calls(killer, settings, stash=True):
        shutil.rmtree(settings.home)
        shutil.copytree(model, settings.home)
        assert killer.run(settings, number, "after", stash=True)
        assert clone(settings, stash=True).ok
        check_is_good(settings, upstream)
        assert git(settings.home, "show", "stash@{0}:kohya_gui.py") == "mine"


def test_files_changed_beside_an_interrupted_switch_are_refused(
    settings: Settings, upstream: Upstream, killer: Killer
) -> None:
    ensure_checkout(settings)
    ensure_checkout(at(settings, upstream.old))
    assert not killer.run(settings, 0, "never")
    calls = (killer.directory / "calls").read_text().splitlines()
    ensure_checkout(at(settings, upstream.old))
    assert killer.run(settings, next(n for n, call in enumerate(calls, 1) if " checkout " in call), "half")
    assert (settings.home / "kohya_gui.py").read_text() == "ne"
    (settings.home / "stays.txt").write_text("mine\n")
    with pytest.raises(UsageError, match=r"stays\.txt"):
        ensure_checkout(settings)
    assert (settings.home / "stays.txt").read_text() == "mine\n"
    git(settings.home, "checkout", "--quiet", "--", "stays.txt")
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_lock_of_the_users_own_git_is_named_and_not_removed(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(at(settings, upstream.old))
    lock = settings.home / ".git" / "index.lock"
    lock.touch()
    with pytest.raises(UsageError, match=r"index\.lock"):
        ensure_checkout(settings)
    assert lock.exists()
    lock.unlink()
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_a_record_that_the_disk_lost_touches_no_file(settings: Settings, upstream: Upstream) -> None:
    ensure_checkout(settings)
    (settings.home / "kohya_gui.py").write_text("mine\n")
    Installation(settings.home).checkout_move.write_bytes(b"\0\0\0")
    with pytest.raises(UsageError, match=r"kohya_gui\.py"):
        ensure_checkout(settings)
    assert (settings.home / "kohya_gui.py").read_text() == "mine\n"


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(
    settings: Settings, upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_checkout(at(settings, upstream.old))
    real = shutil.which("git")
    shim = tmp_path / "full"
    shim.mkdir()
    (shim / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *checkout*) printf ne > "$2/kohya_gui.py"; echo "error: unable to write file: '
        f'No space left on device" >&2; exit 1;; esac\nexec {real} "$@"\n'
    )
    (shim / "git").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{shim}:{os.environ['PATH']}")
        with pytest.raises(StepFailed, match="disk is full"):
            ensure_checkout(settings)
    ensure_checkout(settings)
    check_is_good(settings, upstream)


def test_changes_are_listed_as_git_names_them(settings: Settings) -> None:
    ensure_checkout(settings)
    (settings.home / "docs" / "Größe 1.txt").write_text("mine\n")
    (settings.home / "untracked").write_text("mine\n")
    assert local_changes(settings.home) == ["docs/Größe 1.txt"]
    assert checkout.gitlink(Installation(settings.home), settings.commit)
