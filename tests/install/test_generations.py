from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.install import generations
from kohya_mps.install.generations import (
    Generation,
    Manifest,
    activate,
    active,
    foreign_venv,
    present,
    previous,
    prune,
)
from kohya_mps.install.inventory import Inventory
from tests.support.installs import running_as


@pytest.fixture
def home(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "a home")


def make(home: Installation, name: str, lock: str | None = None) -> Generation:
    """A generation as a build leaves it, or an interrupted one when it has no lock."""
    generation = Generation(home.generations / name)
    (generation.venv / "bin").mkdir(parents=True)
    if lock is not None:
        generation.complete(
            Manifest("validated", lock, "3.11.9", "/usr/bin/python3.11", Inventory({}, (), "", 0, ()), 1.0)
        )
    return generation


def names(found: list[Generation]) -> list[str]:
    return [generation.name for generation in found]


def test_a_home_without_generations_has_none(home: Installation) -> None:
    assert present(home) == []
    assert active(home) is None
    assert previous(home) is None
    assert prune(home, 2) == []


def test_activating_switches_the_link_and_counts_turns(home: Installation) -> None:
    first, second = make(home, "a", "1"), make(home, "b", "2")
    assert first.activation_number() == 0
    activate(home, first)
    activate(home, second)
    assert active(home) == second
    assert home.venv.readlink() == Path(".kohya-mps/generations/b/venv")
    assert (first.activation_number(), second.activation_number()) == (1, 2)
    activate(home, second)
    assert second.activation_number() == 2
    assert previous(home) == first
    activate(home, first)
    assert (active(home), previous(home)) == (first, second)
    assert names(present(home)) == ["a", "b"]


def test_the_latest_is_the_complete_one_that_was_activated_last(home: Installation) -> None:
    assert generations.latest(home) is None
    first, second = make(home, "a", "1"), make(home, "b", "2")
    make(home, "c", "3")
    assert generations.latest(home) is None, "none was active yet"
    activate(home, second)
    activate(home, first)
    assert generations.latest(home) == first
    first.manifest_file.unlink()
    assert generations.latest(home) == second


def test_the_installed_one_is_the_active_one_of_the_profile_that_is_named(home: Installation) -> None:
    with pytest.raises(UsageError, match="there is no environment in") as told:
        generations.installed(home)
    assert "invoke setup" in told.value.fix
    good = make(home, "a", "1")
    activate(home, good)
    assert generations.installed(home) == generations.installed(home, "validated") == good
    with pytest.raises(UsageError, match="of the profile validated, not latest") as told:
        generations.installed(home, "latest")
    assert "invoke setup --profile latest" in told.value.fix
    good.manifest_file.unlink()
    with pytest.raises(UsageError, match="there is no environment in"):
        generations.installed(home)


def test_what_others_can_write_to_is_not_taken_for_installed(home: Installation) -> None:
    activate(home, make(home, "a", "1"))
    home.root.chmod(0o777)
    with pytest.raises(UsageError, match="another user could replace the programs"):
        generations.installed(home)


def test_an_interrupted_build_is_never_made_active(home: Installation) -> None:
    good, half = make(home, "a", "1"), make(home, "b")
    activate(home, good)
    with pytest.raises(StepFailed, match="not built to its end") as told:
        activate(home, half)
    assert "invoke setup" in told.value.fix
    assert active(home) == good
    assert half.manifest() is None
    assert names(present(home)) == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\0\0\0\0", b"\xff"])
def test_a_spoilt_manifest_is_an_interrupted_build(content: bytes, home: Installation) -> None:
    generation = make(home, "a", "1")
    activate(home, generation)
    (generation.path / "manifest.json").write_bytes(content)
    assert generation.manifest() is None
    assert active(home) is None


def test_a_spoilt_turn_counts_as_none(home: Installation) -> None:
    generation = make(home, "a", "1")
    (generation.path / "turn").write_bytes(b"\xff")
    assert generation.activation_number() == 0


def test_the_link_is_never_absent_while_it_is_switched(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(home, "a", "1"), make(home, "b", "2")
    activate(home, first)
    seen: list[bool] = []
    for name in ("replace", "rename", "symlink_to", "unlink"):
        real = getattr(Path, name)

        def watched(self: Path, *args: object, real: object = real, **kwargs: object) -> object:
            seen.append(home.venv.is_symlink() and home.venv.exists())
            result = real(self, *args, **kwargs)  # type: ignore[operator]
            seen.append(home.venv.is_symlink() and home.venv.exists())
            return result

        monkeypatch.setattr(Path, name, watched)
    activate(home, second)
    assert seen
    assert all(seen)


def test_a_home_can_be_moved(home: Installation, tmp_path: Path) -> None:
    activate(home, make(home, "a", "1"))
    home.root.rename(tmp_path / "moved")
    moved = Installation(tmp_path / "moved")
    now = active(moved)
    assert now is not None
    assert now.venv.samefile(moved.venv)


def test_an_environment_of_somebody_elses_is_foreign(home: Installation, tmp_path: Path) -> None:
    home.root.mkdir()
    assert not foreign_venv(home)
    home.venv.mkdir()
    assert foreign_venv(home)
    assert active(home) is None
    home.venv.rmdir()
    home.venv.symlink_to(tmp_path / "comfyui" / "venv")
    assert foreign_venv(home)
    assert active(home) is None
    home.venv.unlink()
    activate(home, make(home, "a", "1"))
    assert not foreign_venv(home)


def test_a_link_to_a_generation_that_is_gone_is_ours_and_not_active(home: Installation) -> None:
    generation = make(home, "a", "1")
    activate(home, generation)
    shutil.rmtree(generation.path)
    assert not foreign_venv(home)
    assert active(home) is None


def test_an_environment_of_somebody_elses_is_moved_aside_only_on_request(home: Installation) -> None:
    generations.set_aside_foreign_venv(home, replace=False)
    home.venv.mkdir(parents=True)
    (home.venv / "theirs").write_text("theirs")
    with pytest.raises(UsageError, match="did not build") as caught:
        generations.set_aside_foreign_venv(home, replace=False)
    assert "--replace-venv" in caught.value.fix
    generations.set_aside_foreign_venv(home, replace=True)
    assert not home.venv.exists()
    assert [p.read_text() for p in home.root.glob("venv.before-kohya-mps-*/theirs")] == ["theirs"]


def test_an_active_one_that_was_spoilt_is_kept_until_another_is_active(home: Installation) -> None:
    broken = make(home, "a", "1")
    activate(home, broken)
    (broken.path / "manifest.json").unlink()
    assert prune(home, 2) == []
    activate(home, make(home, "b", "1"))
    assert prune(home, 2) == ["a"]


def test_the_active_and_the_one_before_it_are_kept_and_older_ones_go(home: Installation) -> None:
    for name in "abcd":
        activate(home, make(home, name, f"lock {name}"))
    assert prune(home, 2) == ["b", "a"]
    assert names(present(home)) == ["d", "c"]
    assert prune(home, 2) == []


def test_one_that_never_was_active_is_not_gone_back_to(home: Installation) -> None:
    make(home, "unused", "1")
    assert generations.latest(home) is None
    active_one = make(home, "a", "2")
    activate(home, active_one)
    assert previous(home) is None
    assert generations.latest(home) == active_one
    home.venv.unlink()
    assert generations.latest(home) == active_one


def test_after_a_rollback_the_one_rolled_back_from_is_kept(home: Installation) -> None:
    for name in "abc":
        activate(home, make(home, name, f"lock {name}"))
    activate(home, Generation(home.generations / "a"))
    prune(home, 2)
    assert names(present(home)) == ["a", "c"]


def test_only_the_active_one_is_kept_when_one_is_configured(home: Installation) -> None:
    for name in "ab":
        activate(home, make(home, name, f"lock {name}"))
    assert prune(home, 1) == ["a"]
    assert active(home) == Generation(home.generations / "b")


def test_one_that_a_training_runs_from_stays_until_it_ends(home: Installation) -> None:
    activate(home, make(home, "a", "1"))
    used = Generation(home.generations / "a")
    for name in "bc":
        activate(home, make(home, name, f"lock {name}"))
    half = make(home, "half")
    with running_as(used.python):
        assert prune(home, 2) == [half.name], "the search goes on"
    assert prune(home, 2) == ["a"]


def test_interrupted_builds_and_ones_that_never_became_active_are_collected(home: Installation) -> None:
    activate(home, make(home, "a", "1"))
    make(home, "half")
    make(home, "unused", "2")
    assert sorted(prune(home, 5)) == ["half", "unused"]
    assert names(present(home)) == ["a"]


def test_a_changed_generation_goes_once_its_repair_is_active(home: Installation) -> None:
    activate(home, make(home, "older", "0"))
    activate(home, make(home, "a", "1"))
    activate(home, make(home, "a-2", "1"))
    assert prune(home, 2) == ["a"]
    assert names(present(home)) == ["a-2", "older"]


def test_a_removal_that_is_cut_short_leaves_an_interrupted_build(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = make(home, "a", "1")

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            generations.discard(generation)
    assert generation.manifest() is None
    assert prune(home, 2) == ["a"]
