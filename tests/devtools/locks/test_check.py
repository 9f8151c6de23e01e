from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from devtools.locks import check, make
from kohya_mps.core import settings
from kohya_mps.core.report import Status
from tests.support.lock_files import failures, write_in_file


def test_a_profile_of_another_python_or_without_a_lock_is_refused(
    constraints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(settings.CONFIG, tmp_path / "config")
    path = tmp_path / "config" / "profiles" / "validated.yaml"
    path.write_text(path.read_text().replace('"3.11"', '"3.12"').replace("lock: train", "lock: gone"))
    monkeypatch.setattr(settings, "CONFIG", tmp_path / "config")
    real = settings.load_profile
    monkeypatch.setattr(settings, "load_profile", lambda name: real(name, config=tmp_path / "config"))
    assert failures() == [
        "names the lock gone, and there is no gone.in",
        "says Python 3.12; the locks are made for 3.11 and no other",
    ]


def test_a_changed_in_file_is_shown_as_a_difference(constraints: Path) -> None:
    write_in_file(constraints, "plain==1.0")
    make.make("train")
    write_in_file(constraints, "plain==1.1")
    (found,) = failures()
    assert "-plain==1.0" in found
    assert "+plain==1.1" in found


def test_a_comment_and_an_order_are_no_difference(constraints: Path) -> None:
    write_in_file(constraints, "plain==1.0", "middle ; sys_platform == 'win32'")
    make.make("train")
    write_in_file(constraints, "# why", "middle ; sys_platform == 'win32'", "plain==1.0  # because")
    assert not failures()


def test_a_change_in_an_included_file_or_a_constraint_is_a_difference(constraints: Path) -> None:
    for name in ("train", "tools"):
        write_in_file(constraints, "plain", name=name)
        make.make(name)
    write_in_file(constraints, "-c tools.txt", "-r tools.in", "plain", name="dev")
    make.make("dev")
    assert not failures()
    write_in_file(constraints, "plain==1.0", name="tools")
    make.make("tools")
    (found,) = failures()
    assert "-c tools.txt" in found
    assert "+plain==1.0" in found


def edit(constraints: Path, old: str, new: str) -> None:
    path = constraints / "train.txt"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_an_edited_pin_is_refused_and_contradicts_the_in_file(constraints: Path) -> None:
    write_in_file(constraints, "plain==1.1")
    make.make("train")
    edit(constraints, "\nplain==1.1", "\nplain==1.0")
    (found,) = failures()
    assert "edited" in found
    assert "-plain==1.1\n+plain: 1.0" in found


def test_one_hash_of_many_taken_away_is_refused(constraints: Path) -> None:
    for path in (settings.ROOT / "constraints").iterdir():
        shutil.copy(path, constraints)
    path = constraints / "train.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.remove(next(line for line in lines if "--hash" in line))
    path.write_text("".join(lines), encoding="utf-8")
    found, with_page = failures()
    assert "edited" in found
    assert "-c train.txt" in with_page


def test_an_unhashed_line_is_refused_by_its_number(constraints: Path) -> None:
    write_in_file(constraints, "plain==1.1")
    path = make.make("train")
    path.write_text(path.read_text(encoding="utf-8") + "middle==1.0\n", encoding="utf-8")
    (found,) = failures()
    assert "middle has no hash, or a malformed one" in found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# for Python 3.11", "# for Python 3.12", "made for Python 3.12"),
        ("#   plain==1.1\n", "#   plain==1.0\n", "edited"),
        ("# sha256 of everything below: ", "# ", "another header"),
        ("nox -s lock -- train", "nox -s lock -- dev", "another header"),
    ],
)
def test_a_header_of_another_make_is_refused(constraints: Path, old: str, new: str, message: str) -> None:
    write_in_file(constraints, "plain==1.1")
    make.make("train")
    edit(constraints, old, new)
    assert any(message in found for found in failures())


def test_a_forbidden_package_in_a_lock_is_refused_with_its_chain(constraints: Path) -> None:
    write_in_file(constraints, "plain")
    make.make("train")
    text = (constraints / "train.txt").read_text(encoding="utf-8")
    digest = f"--hash=sha256:{'0' * 64}\n"
    text += f"middle==1.0 {digest}    # via -r train.in\ntriton==3.1 {digest}    # via\n    #   middle\n"
    (constraints / "train.txt").write_text(text, encoding="utf-8")
    assert "middle needs triton, and triton is forbidden on macOS" in failures()


def test_a_locks_check_needs_no_network_and_no_cache(
    constraints: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_in_file(constraints, "plain")
    make.make("train")
    shutil.rmtree(tmp_path / "wheels")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "no-cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert not failures()
    assert not (tmp_path / "no-cache").exists()


def test_the_projects_own_locks_agree_with_their_in_files() -> None:
    report = check.check_all()
    assert report.ok, [check.detail for check in report.checks if check.status is Status.FAIL]
    assert {check.name for check in report.checks} >= {"train.txt", "tools.txt", "dev.txt"}
