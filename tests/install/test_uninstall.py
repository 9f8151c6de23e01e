from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.errors import Busy, StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import GUI_PRESETS, Settings
from kohya_mps.install import accelerate_config
from kohya_mps.install.checkout import clone
from kohya_mps.install.generations import installed
from kohya_mps.install.setup import setup
from kohya_mps.install.uninstall import uninstall, user_files
from tests.support.installs import Upstream, git, running_as
from tests.support.standin import UNVERIFIED

REPLACING = msgspec.structs.replace(UNVERIFIED, replace_default=True)


@pytest.fixture
def done(settings: Settings) -> Settings:
    """An installation."""
    assert setup(settings, REPLACING).ok
    return settings


def test_everything_that_was_installed_goes(done: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    report = uninstall(done, yes=True)
    assert report.ok
    assert not done.home.exists()
    assert not accelerate_config.default_location().exists()
    printed = capsys.readouterr().err
    assert "This will be removed:" in printed
    for path in (
        done.home,
        Installation(done.home).venv,
        Installation(done.home).state,
        accelerate_config.default_location(),
    ):
        assert str(path) in printed


def test_nothing_installed_is_no_error(settings: Settings) -> None:
    report = uninstall(settings, yes=True)
    assert report.ok
    assert report.checks[0].status is Status.SKIP
    assert not settings.home.exists()


def test_a_backed_up_default_configuration_comes_back(settings: Settings) -> None:
    default = accelerate_config.default_location()
    default.parent.mkdir(parents=True)
    default.write_text("theirs")
    setup(settings, REPLACING)
    assert accelerate_config.is_ours(default)
    uninstall(settings, yes=True)
    assert default.read_text() == "theirs"
    assert not accelerate_config.backup(default).exists()


def test_a_default_configuration_that_was_edited_stays_beside_the_backup(settings: Settings) -> None:
    default = accelerate_config.default_location()
    default.parent.mkdir(parents=True)
    default.write_text("theirs")
    setup(settings, REPLACING)
    default.write_text("edited later")
    report = uninstall(settings, yes=True)
    assert any(check.status is Status.WARN and "stays" in check.detail for check in report.checks)
    assert default.read_text() == "edited later"
    assert accelerate_config.backup(default).read_text() == "theirs"


def untracked(home: Path) -> None:
    (home / "outputs").mkdir()
    (home / "outputs" / "my lora.safetensors").write_text("mine")


def ignored(home: Path) -> None:
    (home / ".gitignore").write_text("venv\n*.ckpt\n")
    git(home, "update-index", "--assume-unchanged", ".gitignore")
    (home / "model.ckpt").write_text("mine")


def in_submodule(home: Path) -> None:
    (home / "sd-scripts" / "my lora.safetensors").write_text("mine")


def changed(home: Path) -> None:
    (home / "kohya_gui.py").write_text("mine")


def stashed(home: Path) -> None:
    changed(home)
    git(home, "stash")


def branched(home: Path) -> None:
    git(home, "branch", "mine")


@pytest.mark.parametrize("things", [untracked, ignored, in_submodule, changed, stashed, branched])
def test_what_is_the_users_stays_even_without_confirmation(
    things: object, done: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(things)
    things(done.home)
    before = {
        path: path.read_bytes()
        for path in done.home.rglob("*.*")
        if path.is_file() and ".kohya-mps" not in path.parts
    }
    report = uninstall(done, yes=True)
    assert report.ok
    assert [check.status for check in report.checks if check.name == "checkout"] == [Status.WARN]
    for path, content in before.items():
        if "venv" not in path.relative_to(done.home).parts:
            assert path.read_bytes() == content
    assert not Installation(done.home).venv.exists()
    assert not list(Installation(done.home).generations.glob("*"))
    # Only the flag of its own gives them up, and only then.
    assert "--delete-my-files" in capsys.readouterr().err
    assert uninstall(done, yes=True, delete_my_files=True).ok
    assert not done.home.exists()


def test_a_checkout_that_was_there_before_is_never_removed(settings: Settings, upstream: Upstream) -> None:
    git(upstream.kohya_ss, "clone", "--quiet", "--recurse-submodules", ".", str(settings.home))
    setup(settings, UNVERIFIED)
    for flag in (False, True):
        uninstall(settings, yes=True, delete_my_files=flag)
        assert (settings.home / "kohya_gui.py").exists()
        assert git(settings.home, "status", "--porcelain") == ""
    assert not Installation(settings.home).state.exists()


def test_a_foreign_environment_in_the_home_stays(done: Settings) -> None:
    home = Installation(done.home)
    home.venv.unlink()
    home.venv.mkdir()
    (home.venv / "theirs").write_text("theirs")
    uninstall(done, yes=True, delete_my_files=True)
    assert (home.venv / "theirs").read_text() == "theirs"


def test_without_a_terminal_to_ask_on_it_is_refused(done: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UsageError, match="--yes"):
        uninstall(done)
    assert Installation(done.home).venv.exists()


@pytest.mark.parametrize(
    ("answer", "removed"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_a_person_has_to_confirm(
    answer: str, removed: bool, done: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if removed:
        uninstall(done)
    else:
        with pytest.raises(StepFailed, match="nothing was removed"):
            uninstall(done)
    assert done.home.exists() is not removed


def test_a_default_configuration_of_ours_goes_even_without_a_receipt(done: Settings) -> None:
    installed(Installation(done.home)).receipt.unlink()
    assert uninstall(done, yes=True).ok
    assert not accelerate_config.default_location().exists()


def test_our_presets_and_what_is_derived_are_not_the_users(done: Settings) -> None:
    presets = done.home / "presets"
    presets.mkdir()
    (presets / "ours.json").symlink_to(GUI_PRESETS / "ours.json")
    (done.home / "setup.log").touch()
    (done.home / "docs" / "__pycache__").mkdir()
    (done.home / "docs" / "__pycache__" / "x.pyc").touch()
    assert user_files(Installation(done.home)) == []
    (presets / "mine.json").symlink_to(done.home / "kohya_gui.py")
    assert user_files(Installation(done.home)) == ["presets/mine.json"]


def test_a_clone_alone_can_be_removed(settings: Settings) -> None:
    clone(settings)
    assert uninstall(settings, yes=True).ok
    assert not settings.home.exists()


def test_a_home_in_use_is_refused(done: Settings) -> None:
    with exclusive_lock(Installation(done.home)), pytest.raises(Busy):
        uninstall(done, yes=True)
    assert Installation(done.home).venv.exists()


def test_nothing_is_removed_under_a_training(done: Settings) -> None:
    home = Installation(done.home)
    with running_as(home.venv / "bin" / "python") as training, pytest.raises(Busy, match=f"{training}"):
        uninstall(done, yes=True)
    assert home.venv.exists()
    assert uninstall(done, yes=True).ok
