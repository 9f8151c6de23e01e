"""The doctor on this machine: real variables, files and repositories, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.report import Report, Status
from kohya_mps.core.settings import ROOT, Settings
from kohya_mps.diagnose import doctor
from kohya_mps.diagnose.doctor import DoctorOptions
from kohya_mps.diagnose.machine_facts import MachineFacts

BROKEN = "torch==2.8.0.*\ntorchvision==0.22.*\n-r requirements.txt\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("CONDA_PREFIX", "VIRTUAL_ENV", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return settings.load()


def found(report: Report) -> list[str]:
    names: list[str] = report.extra["failures"]
    return names


def test_before_anything_is_installed_nothing_fails(here: Settings) -> None:
    report = doctor.examine(here, DoctorOptions())

    assert found(report) == ["interrupted-environment"]
    assert report.ok
    assert {"architecture", "git", "disk", "memory", "home"} <= {check.name for check in report.checks}


def test_contradicting_watermarks_fail_with_the_remedy(
    here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.7")
    report = doctor.examine(here, DoctorOptions())

    row = next(check for check in report.checks if check.name == "MPS variables")
    assert row.status is Status.FAIL
    assert "unset PYTORCH_MPS_HIGH_WATERMARK_RATIO" in row.fix

    monkeypatch.setenv("PYTORCH_MPS_LOW_WATERMARK_RATIO", "0.5")
    assert "watermark-ratio" not in found(doctor.examine(here, DoctorOptions()))

    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "lots")
    assert "watermark-ratio" in found(doctor.examine(here, DoctorOptions()))


def test_hf_home_as_a_file_and_other_pythons_are_found(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf").write_text("")
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda")
    report = doctor.examine(here, DoctorOptions())

    assert {"accelerate-default", "foreign-python-leaks-in"} <= set(found(report))


@pytest.mark.parametrize("link", [True, False])
def test_this_projects_own_environment_is_no_stranger(
    link: bool, here: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(ROOT / ".venv" if link else tmp_path))

    assert ("foreign-python-leaks-in" in found(doctor.examine(here, DoctorOptions()))) is not link


def test_the_default_configuration_that_says_cpu_is_seen(
    here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kohya_mps.diagnose import preflight
    from kohya_mps.known_failures import catalogue, rules

    default = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    default.parent.mkdir(parents=True)
    default.write_text('{"use_cpu": true}')
    machine: MachineFacts = doctor.examine(here, DoctorOptions()).extra["machine"]

    assert machine.default_use_cpu is True
    facts = msgspec.structs.asdict(machine)
    mac = preflight.target_for(here, "mps")
    assert "cpu-without-a-word" in [
        f.failure.id for f in rules.matching(catalogue.known(), "environment", facts, mac)
    ]


def test_a_home_with_a_space_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Settings
) -> None:
    spaced = msgspec.structs.replace(here, home=tmp_path / "my tools")

    assert "spaces-in-the-path" in found(doctor.examine(spaced, DoctorOptions()))


def repository(path: Path, requirements: str) -> str:
    path.mkdir()
    git = ["git", "-C", str(path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (path / "requirements_macos_arm64.txt").write_text(requirements)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    return str(path)


@pytest.mark.parametrize(
    ("requirements", "broken"),
    [(BROKEN, True), (BROKEN.replace("0.22", "0.23"), False), ("numpy\n", None)],
)
def test_online_says_whether_upstreams_file_is_corrected(
    requirements: str, broken: bool | None, tmp_path: Path, here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    url = repository(tmp_path / "upstream", requirements)
    report = doctor.examine(msgspec.structs.replace(here, url=url), DoctorOptions(online=True))

    assert report.extra["machine"].repository_reached
    assert report.extra["machine"].upstream_pair_broken is broken
    assert ("upstream-torch-pair" in found(report)) is (broken is True)


def test_a_repository_that_does_not_answer_fails(
    tmp_path: Path, here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    report = doctor.examine(
        msgspec.structs.replace(here, url=str(tmp_path / "none")), DoctorOptions(online=True)
    )

    assert not report.ok
    assert "no-network" in found(report)


def test_invoke_doctor_imports_no_torch_and_prints_json_alone(here: Settings) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "invoke", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert json.loads(done.stdout)["ok"] is (done.returncode == 0)
    assert "torch" not in [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
