"""The facts about this machine and an installation on it, from real variables and files."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import free_disk_gb, memory_gb, on_mac
from kohya_mps.core.report import Check, Status
from kohya_mps.core.settings import ROOT
from kohya_mps.diagnose.machine_facts import MachineFacts, machine_facts, with_environment
from kohya_mps.install.generations import Generation, Manifest
from kohya_mps.install.inventory import Inventory, site_packages
from tests.support.installs import make_settings, stand_in_python


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return Installation(tmp_path / "home")


def look(home: Installation) -> MachineFacts:
    return machine_facts(make_settings(home.root), home)


def test_an_empty_machine_has_no_trouble(home: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    found = look(home)

    assert (found.system, found.architecture) == (platform.system(), platform.machine())
    assert found.tools_python == platform.python_version()
    assert found.memory_gb == memory_gb()
    assert found.free_gb == pytest.approx(free_disk_gb(home.root), rel=0.2)
    assert found.needed_gb == 0
    assert found.git is not None
    assert found.git.startswith("git version")
    assert (found.high_watermark, found.low_watermark, found.watermark_nonsense) == (1.7, 1.4, None)
    assert (found.home, found.venv, found.home_has_space) == (str(home.root), str(home.venv), False)
    absent = (
        "conda", "other_venv", "pythonpath", "hf_home", "mps_fallback", "default_use_cpu",
        "trainer_python", "tkinter", "drift", "forbidden", "missing_packages", "config",
    )  # fmt: skip
    assert {name: getattr(found, name) for name in absent} == dict.fromkeys(absent)
    flags = ("hf_home_is_file", "foreign_venv", "installed", "interrupted", "default_config_is_directory")
    assert [getattr(found, name) for name in flags] == [False] * 5
    if not on_mac():
        assert (found.macos, found.macos_is_older, found.xcode) == (None, False, None)
        assert (found.rosetta, found.virtual_machine) == (False, False)


@pytest.mark.parametrize(
    ("variable", "value", "name", "expected"),
    [
        ("CONDA_PREFIX", "/opt/conda", "conda", "/opt/conda"),
        ("CONDA_PREFIX", "", "conda", None),
        ("PYTHONPATH", "/x", "pythonpath", "/x"),
        ("PYTHONPATH", "", "pythonpath", None),
        ("VIRTUAL_ENV", "/somewhere", "other_venv", "/somewhere"),
        ("VIRTUAL_ENV", str(ROOT / ".venv"), "other_venv", None),
        ("VIRTUAL_ENV", "", "other_venv", None),
        ("PYTORCH_ENABLE_MPS_FALLBACK", "1", "mps_fallback", "1"),
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.7", "high_watermark", 0.7),
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.7", "low_watermark", 1.4),
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.7", "watermark_nonsense", None),
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "lots", "high_watermark", None),
        ("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "lots", "watermark_nonsense", "lots"),
        ("PYTORCH_MPS_LOW_WATERMARK_RATIO", "0.5", "low_watermark", 0.5),
        ("PYTORCH_MPS_LOW_WATERMARK_RATIO", "", "watermark_nonsense", ""),
        ("HF_HOME", "", "hf_home", None),
        ("HF_HOME", "/x", "hf_home", "/x"),
    ],
)
def test_variables_are_seen(
    variable: str, value: str, name: str, expected: Any, home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    assert getattr(look(home), name) == expected


def test_the_trainers_own_environment_is_no_stranger(
    home: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(home.venv))

    assert look(home).other_venv is None


def test_an_hf_home_that_is_a_file_is_seen(home: Installation, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("")

    assert look(home).hf_home_is_file


@pytest.mark.parametrize(
    ("text", "use_cpu"),
    [("use_cpu: true\n", True), ("use_cpu: false\n", False), ("{}\n", False), ("[1]\n", None), ("{", None)],
)
def test_the_default_configuration_is_read(
    text: str, use_cpu: bool | None, home: Installation, tmp_path: Path
) -> None:
    default = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text(text)

    assert look(home).default_use_cpu is use_cpu
    assert look(home).default_config == str(default)


def test_a_default_configuration_that_is_a_directory_is_seen(home: Installation, tmp_path: Path) -> None:
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").mkdir(parents=True)

    assert look(home).default_config_is_directory


def test_a_home_that_has_no_letters_does_not_tell_whether_case_counts(
    home: Installation, tmp_path: Path
) -> None:
    numbers, letters = tmp_path / "123", tmp_path / "abc d"
    numbers.mkdir()
    letters.mkdir()

    assert look(Installation(numbers)).case_sensitive is None
    assert look(Installation(letters)).home_has_space
    if not on_mac():
        assert look(Installation(letters)).case_sensitive is True
        (tmp_path / "ABC D").symlink_to(letters)  # as if case did not count
        assert look(Installation(letters)).case_sensitive is False


# ---- With an environment ------------------------------------------------------------------------


def environment(home: Installation, *, tkinter: bool = True, complete: bool = True) -> Generation:
    generation = Generation(home.generations / "small")
    stand_in_python(
        generation, f"import sys\nsys.exit({0 if tkinter else 1} if 'import _tkinter' in sys.argv else 9)\n"
    )
    site = site_packages(generation.venv)
    for distribution in ("torch-2.5.1", "bitsandbytes-0.44.0"):
        (site / f"{distribution}.dist-info").mkdir(parents=True)
    generation.accelerate_config.write_text("use_cpu: true\n")
    if complete:
        inventory = Inventory({}, (), "", 0, ())
        generation.complete(Manifest("small", "0", "3.11.9", sys.executable, inventory, 0.0))
    return generation


def test_the_environments_packages_and_configuration_are_seen(home: Installation) -> None:
    chosen = make_settings(home.root)
    checks = (
        Check("package numpy", Status.FAIL, "2.0 instead of 1.26"),
        Check("package torch", Status.FAIL, "is damaged"),
        Check("checkout", Status.PASS, "clean"),
    )
    locked = {"torch": "2.5.1", "numpy": "1.26", "rich": "13"}
    generation = environment(home)
    found = with_environment(look(home), chosen, generation, checks, locked)

    assert (found.trainer_python, found.tkinter) == ("3.11.9", True)
    assert found.drift == "numpy 2.0 instead of 1.26, torch is damaged"
    assert found.forbidden == "bitsandbytes 0.44.0"
    assert found.missing_packages == "numpy, rich"
    assert found.config_use_cpu is True
    assert found.config == str(generation.accelerate_config)


def test_a_python_without_tkinter_and_an_unfinished_environment_are_seen(home: Installation) -> None:
    generation = environment(home, tkinter=False, complete=False)
    found = with_environment(look(home), make_settings(home.root), generation, (), {"torch": "2.5.1"})

    assert (found.tkinter, found.trainer_python) == (False, None)
    assert (found.drift, found.missing_packages) == (None, None)
    assert (found.interrupted, found.installed) == (True, False)
