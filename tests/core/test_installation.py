from __future__ import annotations

import os
import pwd
import shlex
from pathlib import Path

import pytest

from kohya_mps.core import installation as home_module
from kohya_mps.core.errors import UsageError
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation, check_location, installed_profile


@pytest.fixture
def home(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "it's a $(home)")


def refused(home: Installation) -> str:
    with pytest.raises(UsageError) as caught:
        check_location(home)
    assert "choose another directory with KOHYA_HOME" in caught.value.fix
    return str(caught.value)


def test_a_new_directory_an_empty_one_and_a_checkout_are_accepted(home: Installation) -> None:
    check_location(home)
    home.root.mkdir(parents=True)
    check_location(home)
    (home.root / ".DS_Store").touch()
    home.state.mkdir()
    home.venv.mkdir()
    check_location(home)
    (home.root / ".git").mkdir()
    (home.root / "kohya_gui.py").touch()
    check_location(home)


def test_a_file_and_a_path_below_a_file_are_refused(home: Installation) -> None:
    home.root.touch()
    assert "is not a directory" in refused(home)
    assert "is not a directory" in refused(Installation(home.root / "below" / "it"))


def test_a_link_to_nowhere_is_refused_and_a_link_to_a_directory_is_not(
    home: Installation, tmp_path: Path
) -> None:
    home.root.symlink_to(tmp_path / "elsewhere")
    assert "is not a directory" in refused(home)
    (tmp_path / "elsewhere").mkdir()
    check_location(home)


def test_a_directory_with_something_else_in_it_is_refused_with_what_it_holds(home: Installation) -> None:
    home.root.mkdir()
    for n in range(7):
        (home.root / f"thesis-{n}.tex").touch()
    message = refused(home)
    assert "thesis-0.tex" in message
    assert "and 2 more" in message
    assert "KOHYA_HOME" in message


def test_a_checkout_whose_repository_was_being_replaced_is_accepted(home: Installation) -> None:
    home.root.mkdir()
    (home.root / "kohya_gui.py").touch()
    assert "kohya_gui.py" in refused(home)
    write_atomic(home.checkout_move, b"{}")
    check_location(home)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(home: Installation, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "not writable" in refused(home)
    finally:
        tmp_path.chmod(0o700)


def test_a_directory_that_the_system_calls_unwritable_is_refused(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "not writable" in refused(home)


def test_a_path_below_a_directory_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared by all"
    shared.mkdir()
    shared.chmod(0o777)
    message = refused(Installation(shared / "deep" / "home"))
    assert f"{shared} can be written by every user" in message
    assert f"chmod go-w '{shared}'" in message


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_refused(home: Installation) -> None:
    home.generations.mkdir(parents=True)
    os.chown(home.generations, 12345, -1)
    message = refused(home)
    assert f"{home.generations} belongs to another user" in message
    user = pwd.getpwuid(os.getuid()).pw_name
    assert f"sudo chown -R {user} {shlex.quote(str(home.generations))}" in message
    os.chown(home.generations, 0, -1)
    check_location(home)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a directory away")
def test_programs_that_another_user_owns_are_refused(home: Installation) -> None:
    programs = home.venv / "bin"
    programs.mkdir(parents=True)
    os.chown(programs, 12345, -1)
    assert f"{programs} belongs to another user" in refused(home)


def test_a_directory_that_may_be_listed_but_not_entered_is_refused(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may do both, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.W_OK)
    assert "not writable" in refused(home)


def test_the_profile_of_an_empty_home_is_unknown(home: Installation) -> None:
    assert installed_profile(home) == ""
    home.venv.mkdir(parents=True)
    assert installed_profile(home) == ""


def test_a_directory_that_another_group_can_write_is_refused_and_the_users_own_group_is_not(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.root.mkdir()
    home.root.chmod(0o775)
    monkeypatch.setattr(home_module, "_private_group", lambda: home.root.stat().st_gid)
    check_location(home)
    if home.root.stat().st_gid == 0:
        os.chown(home.root, -1, 1)
    monkeypatch.setattr(home_module, "_private_group", lambda: None)
    assert f"{home.root} can be written by its group: another user" in refused(home)


def test_the_sticky_bit_protects_what_lies_below(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    temporary.chmod(0o1777)
    check_location(Installation(temporary / "home"))
