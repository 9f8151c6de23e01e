from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kohya_mps.install import inventory
from kohya_mps.install.inventory import Difference, differences, take
from tests.support.wheelhouse import wheel

INFO = "plain-1.0.dist-info"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """What an installer leaves: two unpacked wheels below lib, and a link to an interpreter."""
    import zipfile

    root = tmp_path / "venv"
    site = root / "lib" / "python3.11" / "site-packages"
    for name, version in (("plain", "1.0"), ("Other.Thing", "2.1+local")):
        made = wheel(tmp_path / "wheels", name, version, files={f"{name}/core.py": b"VALUE = 1\n"})
        with zipfile.ZipFile(made) as archive:
            archive.extractall(site)
    (root / "bin").mkdir()
    (root / "bin" / "python").symlink_to("/usr/bin/python3.11")
    (root / "pyvenv.cfg").write_text("home = /usr/bin\n")
    return root


def site_of(venv: Path) -> Path:
    return venv / "lib" / "python3.11" / "site-packages"


def test_distributions_are_found_by_canonical_name(venv: Path) -> None:
    assert inventory.versions(venv) == {"plain": "1.0", "other-thing": "2.1+local"}
    assert inventory.site_packages(venv) == site_of(venv)


def test_a_missing_environment_is_empty(tmp_path: Path) -> None:
    assert inventory.versions(tmp_path / "none") == {}
    assert take(tmp_path / "none").distributions == {}


def test_an_untouched_environment_and_one_that_was_used_are_as_built(venv: Path) -> None:
    built = take(venv)
    cache = site_of(venv) / "plain" / "__pycache__"
    cache.mkdir()
    (cache / "core.cpython-311.pyc").write_bytes(b"x")
    (site_of(venv) / "__pycache__").mkdir()
    assert differences(built, take(venv)) == []


def _delete(venv: Path) -> None:
    (site_of(venv) / "plain" / "core.py").unlink()


def _edit(venv: Path) -> None:
    (site_of(venv) / "plain" / "core.py").write_bytes(b"VALUE = 12345\n")


def _touch(venv: Path) -> None:
    os.utime(site_of(venv) / "plain" / "core.py", ns=(1, 1))


def _remove(venv: Path) -> None:
    for path in (site_of(venv) / INFO).iterdir():
        path.unlink()
    (site_of(venv) / INFO).rmdir()


def _replace(venv: Path) -> None:
    (site_of(venv) / INFO).rename(site_of(venv) / "plain-2.0.dist-info")


def _add(venv: Path) -> None:
    (site_of(venv) / "gradio-6.0.dist-info").mkdir()
    (site_of(venv) / "gradio").mkdir()


def _stray(venv: Path) -> None:
    (site_of(venv) / "sitecustomize.py").write_text("")


def _spoil_record(venv: Path) -> None:
    (site_of(venv) / INFO / "RECORD").write_bytes(b"\xff\x00\x00")


def _configuration(venv: Path) -> None:
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")


def _interpreter(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/usr/bin/python3.12")


CHANGED = Difference("changed", "plain", "files of 1.0 were changed or deleted")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_delete, CHANGED),
        (_edit, CHANGED),
        (_touch, CHANGED),
        (_spoil_record, CHANGED),
        (_remove, Difference("missing", "plain", "1.0 was removed")),
        (_replace, Difference("changed", "plain", "1.0 was replaced by 2.0")),
        (_add, Difference("added", "gradio", "6.0 was installed later")),
        (_stray, Difference("added", "sitecustomize.py", "is in site-packages and belongs to no package")),
        (_configuration, Difference("changed", "interpreter", "pyvenv.cfg or bin/python was changed")),
        (_interpreter, Difference("changed", "interpreter", "pyvenv.cfg or bin/python was changed")),
    ],
)
def test_a_change_is_named(change: Callable[[Path], None], expected: Difference, venv: Path) -> None:
    built = take(venv)
    change(venv)
    assert differences(built, take(venv)) == [expected]


def test_a_missing_configuration_is_a_change(venv: Path) -> None:
    built = take(venv)
    (venv / "pyvenv.cfg").unlink()
    assert [d.name for d in differences(built, take(venv))] == ["interpreter"]


def test_files_of_another_size_than_the_wheels_are_found(venv: Path) -> None:
    assert take(venv).incomplete == ()
    assert take(venv).bytes > len(b"VALUE = 1\n")
    _edit(venv)
    assert take(venv).incomplete == ("plain",)
    _delete(venv)
    assert take(venv).incomplete == ("plain",)


def test_an_edited_file_is_distinguished_from_one_that_was_only_touched_or_deleted(venv: Path) -> None:
    names = ["plain", "other-thing"]
    _touch(venv)
    assert inventory.damaged(venv, names) == []
    (site_of(venv) / "plain" / "core.py").write_bytes(b"VALUE = 2\n")  # of the same size
    assert inventory.damaged(venv, names) == ["plain"]
    assert inventory.damaged(venv, ["other-thing"]) == []
    _delete(venv)
    assert inventory.damaged(venv, names) == []


@pytest.mark.parametrize("spoilt", [b"\xff\x00\x00", b"plain/core.py,sha256=x,many\nplain/\x00,,1\n", b'"'])
def test_a_spoilt_list_of_files_is_a_difference_and_no_error(spoilt: bytes, venv: Path) -> None:
    built = take(venv)
    (site_of(venv) / INFO / "RECORD").write_bytes(spoilt)
    assert differences(built, take(venv)) == [CHANGED]
    assert set(take(venv).incomplete) <= {"plain"}
    assert set(inventory.damaged(venv, ["plain"])) <= {"plain"}
