from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from devtools.locks import make
from kohya_mps.core import settings
from kohya_mps.core.errors import KohyaError, StepFailed, UsageError
from kohya_mps.core.report import Status
from kohya_mps.install import lockfile
from tests.support.wheelhouse import LINUX, source_archive, wheel


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A constraints directory whose packages come from a folder beside it."""
    folder = tmp_path / "constraints"
    folder.mkdir()
    monkeypatch.setattr(settings, "CONSTRAINTS", folder)
    monkeypatch.setattr(settings, "profile_names", lambda *_: ["validated"])
    house = tmp_path / "wheels"
    wheel(house, "plain", "1.0")
    wheel(house, "plain", "1.1")
    wheel(house, "outer", "2.0", requires=["middle>=1"])
    wheel(house, "middle", "1.0", requires=["triton"])
    wheel(house, "triton", "3.1")
    wheel(house, "linux-outer", "1.0", requires=["linux-only"])
    wheel(house, "linux-only", "1.0", tag=LINUX)
    wheel(house, "uses-source", "1.0", requires=["sourceonly"])
    source_archive(house, "sourceonly", "1.0")
    return folder


def ask(room: Path, *lines: str, name: str = "train") -> Path:
    head = "# exclude-newer: 2026-02-20\n--no-index\n--find-links ../wheels\n"
    path = room / f"{name}.in"
    path.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def failures() -> list[str]:
    return [check.detail for check in make.check_all().checks if check.status is Status.FAIL]


def test_a_lock_is_made_once_and_the_second_time_is_the_same(room: Path) -> None:
    ask(room, "plain")
    first = make.make("train").read_text(encoding="utf-8")
    assert "nox -s lock -- train" in first.splitlines()[1]
    assert make.make("train").read_text(encoding="utf-8") == first
    assert lockfile.read(room / "train.txt").versions(lockfile.MAC_ARM64) == {"plain": "1.1"}
    assert not failures()


def test_an_override_counts_in_place_of_what_a_distribution_says(room: Path) -> None:
    house = room.parent / "wheels"
    wheel(house, "page", "1.0", requires=["plain<1.1"])
    ask(room, "plain==1.1")
    make.make("train")
    ask(room, "-c train.txt", "page", name="gui")
    with pytest.raises(StepFailed, match=r"plain<1\.1"):
        make.make("gui")
    ask(room, "-c train.txt", "page", "# override: plain>=1.1", name="gui")
    make.make("gui")
    assert lockfile.read(room / "gui.txt").versions(lockfile.MAC_ARM64)["plain"] == "1.1"
    assert not failures()
    ask(room, "-c train.txt", "page", name="gui")
    assert any("-override plain>=1.1" in detail for detail in failures())


def test_a_lock_comes_after_the_one_that_it_holds_to(room: Path) -> None:
    ask(room, "plain", name="zebra")
    ask(room, "-c zebra.txt", "middle", name="ape")
    assert make.names() == ["zebra", "ape"]


def test_versions_stay_until_an_upgrade_is_asked_for(room: Path) -> None:
    ask(room, "plain==1.0")
    make.make("train")
    ask(room, "plain")
    make.make("train")
    assert lockfile.read(room / "train.txt").pins[0].version == "1.0"
    report = make.make_all(make.parse_options(["--upgrade"]))
    assert lockfile.read(room / "train.txt").pins[0].version == "1.1"
    assert "plain 1.0 -> 1.1" in report.checks[0].detail


def test_a_cutoff_is_written_into_the_in_file_and_a_bad_one_is_refused(room: Path) -> None:
    source = ask(room, "plain")
    make.make_all(make.parse_options(["train", "--cutoff", "2026-03-01"]))
    assert "# exclude-newer: 2026-03-01" in source.read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="2026-02-31"):
        make.make("train", cutoff="2026-02-31")


def test_a_failed_lock_changes_neither_file(room: Path) -> None:
    source = ask(room, "plain")
    make.make("train")
    ask(room, "outer")
    before = source.read_bytes(), (room / "train.txt").read_bytes()
    with pytest.raises(StepFailed):
        make.make("train", cutoff="2026-03-01")
    assert (source.read_bytes(), (room / "train.txt").read_bytes()) == before


def test_only_known_names_are_taken(room: Path) -> None:
    ask(room, "plain")
    ask(room, "plain", name="gui")
    assert set(make.parse_options([]).names) == {"train", "gui"}
    assert make.parse_options(["--profile", "validated"]).names == ("train", "gui")
    with pytest.raises(UsageError, match="'nothing'"):
        make.parse_options(["nothing"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["plain", "outer"], "outer needs middle needs triton, and triton is forbidden on macOS"),
        (["linux-outer"], "linux-outer needs linux-only\n"),
        (["uses-source"], "uses-source needs sourceonly\n"),
        (["plain==1.0", "plain==1.1"], "you require plain==1.0 and plain==1.1"),
        (["nowhere-to-be-found"], "nowhere-to-be-found was not found"),
    ],
    ids=["forbidden", "no wheel for a Mac", "source only", "contradiction", "unknown"],
)
def test_what_a_mac_cannot_install_is_refused_with_its_chain(room: Path, lines: list[str], said: str) -> None:
    ask(room, *lines)
    with pytest.raises(StepFailed) as refusal:
        make.make("train")
    assert said in refusal.value.what
    assert "nox -s lock -- train" in refusal.value.fix or "leave" in refusal.value.fix
    assert not (room / "train.txt").exists()


def test_a_forbidden_package_that_only_linux_installs_is_allowed(room: Path) -> None:
    ask(room, "triton ; sys_platform == 'linux'", "plain")
    make.make("train")
    assert not failures()


def test_a_profile_of_another_python_or_without_a_lock_is_refused(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


def test_a_changed_in_file_is_shown_as_a_difference(room: Path) -> None:
    ask(room, "plain==1.0")
    make.make("train")
    ask(room, "plain==1.1")
    (found,) = failures()
    assert "-plain==1.0" in found
    assert "+plain==1.1" in found


def test_a_comment_and_an_order_are_no_difference(room: Path) -> None:
    ask(room, "plain==1.0", "middle ; sys_platform == 'win32'")
    make.make("train")
    ask(room, "# why", "middle ; sys_platform == 'win32'", "plain==1.0  # because")
    assert not failures()


def test_a_change_in_an_included_file_or_a_constraint_is_a_difference(room: Path) -> None:
    for name in ("train", "tools"):
        ask(room, "plain", name=name)
        make.make(name)
    ask(room, "-c tools.txt", "-r tools.in", "plain", name="dev")
    make.make("dev")
    assert not failures()
    ask(room, "plain==1.0", name="tools")
    make.make("tools")
    (found,) = failures()
    assert "-c tools.txt" in found
    assert "+plain==1.0" in found


def edit(room: Path, old: str, new: str) -> None:
    path = room / "train.txt"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_an_edited_pin_is_refused_and_contradicts_the_in_file(room: Path) -> None:
    ask(room, "plain==1.1")
    make.make("train")
    edit(room, "\nplain==1.1", "\nplain==1.0")
    (found,) = failures()
    assert "edited" in found
    assert "-plain==1.1\n+plain: 1.0" in found


def test_one_hash_of_many_taken_away_is_refused(room: Path) -> None:
    for path in (settings.ROOT / "constraints").iterdir():
        shutil.copy(path, room)
    path = room / "train.txt"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines.remove(next(line for line in lines if "--hash" in line))
    path.write_text("".join(lines), encoding="utf-8")
    found, with_page = failures()
    assert "edited" in found
    assert "-c train.txt" in with_page


def test_an_unhashed_line_is_refused_by_its_number(room: Path) -> None:
    ask(room, "plain==1.1")
    path = make.make("train")
    path.write_text(path.read_text(encoding="utf-8") + "middle==1.0\n", encoding="utf-8")
    (found,) = failures()
    assert "middle has a missing or malformed hash" in found


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# for Python 3.11", "# for Python 3.12", "made for Python 3.12"),
        ("#   plain==1.1\n", "#   plain==1.0\n", "edited"),
        ("# sha256 of everything below: ", "# ", "another header"),
        ("nox -s lock -- train", "nox -s lock -- dev", "another header"),
    ],
)
def test_a_header_of_another_make_is_refused(room: Path, old: str, new: str, said: str) -> None:
    ask(room, "plain==1.1")
    make.make("train")
    edit(room, old, new)
    assert any(said in found for found in failures())


def test_a_forbidden_package_in_a_lock_is_refused_with_its_chain(room: Path) -> None:
    ask(room, "plain")
    make.make("train")
    text = (room / "train.txt").read_text(encoding="utf-8")
    digest = f"--hash=sha256:{'0' * 64}\n"
    text += f"middle==1.0 {digest}    # via -r train.in\ntriton==3.1 {digest}    # via\n    #   middle\n"
    (room / "train.txt").write_text(text, encoding="utf-8")
    assert "middle needs triton, and triton is forbidden on macOS" in failures()


def test_a_missing_lock_or_in_file_is_refused(room: Path) -> None:
    ask(room, "-r gone.in", "plain")
    assert "cannot be read" in failures()[0]
    with pytest.raises(KohyaError, match=r"gone\.in"):
        make.make("train")


def test_a_locks_check_needs_no_network_and_no_cache(
    room: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask(room, "plain")
    make.make("train")
    shutil.rmtree(tmp_path / "wheels")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "no-cache"))
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert not failures()
    assert not (tmp_path / "no-cache").exists()


def test_the_projects_own_locks_agree_with_their_in_files() -> None:
    report = make.check_all()
    assert report.ok, [check.detail for check in report.checks if check.status is Status.FAIL]
    assert {check.name for check in report.checks} >= {"train.txt", "tools.txt", "dev.txt"}


def test_a_chain_is_the_shortest_and_a_circle_ends() -> None:
    needs = {"a": ["b", "c"], "b": ["a", "d"], "c": ["d"], "d": ["e"]}
    assert make.chain(needs, ["a", "d"], "e") == "d needs e"
    assert make.chain(needs, ["a"], "e") == "a needs b needs d needs e"
    assert make.chain(needs, ["a"], "unknown") == "unknown"
