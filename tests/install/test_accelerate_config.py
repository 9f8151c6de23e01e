from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
import yaml

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import Settings
from kohya_mps.install import accelerate_config
from kohya_mps.install.accelerate_config import (
    backup,
    check_precision,
    default_location,
    is_current,
    is_ours,
    original,
)
from kohya_mps.install.generations import Generation
from tests.support.installs import make_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "home")


@pytest.fixture
def generation(settings: Settings, tmp_path: Path) -> Generation:
    """A generation whose own configuration is in place already."""
    generation = Generation(tmp_path / "generation")
    generation.path.mkdir()
    generation.accelerate_config.write_text(yaml.safe_dump(accelerate_config.fields(settings)))
    return generation


@pytest.fixture
def default(tmp_path: Path) -> Path:
    return tmp_path / "user" / ".cache" / "huggingface" / "accelerate" / "default_config.yaml"


def row(report: Report) -> Check:
    return next(check for check in report.checks if check.name == "accelerate default")


def with_precision(settings: Settings, precision: str) -> Settings:
    return msgspec.structs.replace(settings, mixed_precision=precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", ""])
def test_on_a_mac_only_full_precision_is_accepted_and_the_error_says_why(
    precision: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohya_mps.install.accelerate_config.expected_device", lambda: "mps")
    check_precision(settings)
    with pytest.raises(
        UsageError, match=f"'{precision}' does not work on mps with the profile small"
    ) as caught:
        check_precision(with_precision(settings, precision))
    assert caught.value.fix.startswith("accepted: no (")


@pytest.mark.parametrize(("device", "precision"), [("cuda", "fp16"), ("cuda", "bf16"), ("cpu", "bf16")])
def test_other_devices_accept_what_the_profile_says(
    device: str, precision: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohya_mps.install.accelerate_config.expected_device", lambda: device)
    check_precision(with_precision(settings, precision))


def test_a_refused_precision_writes_nothing(
    settings: Settings, generation: Generation, default: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohya_mps.install.accelerate_config.expected_device", lambda: "mps")
    before = generation.accelerate_config.read_bytes()
    with pytest.raises(UsageError):
        accelerate_config.configure(with_precision(settings, "fp16"), generation)
    assert generation.accelerate_config.read_bytes() == before
    assert not default.exists()


def test_the_configuration_never_keeps_accelerate_on_the_cpu(settings: Settings) -> None:
    values = accelerate_config.fields(settings)
    assert values["use_cpu"] is False
    assert values["compute_environment"] == "LOCAL_MACHINE"
    assert (values["num_machines"], values["num_processes"]) == (1, 1)
    assert values["mixed_precision"] == "no"


def test_a_configuration_is_current_only_if_it_has_every_field_and_value(
    settings: Settings, tmp_path: Path
) -> None:
    values = accelerate_config.fields(settings)
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({**values, "further": 1}))
    assert is_current(path, values)
    for spoilt in (
        yaml.safe_dump({**values, "use_cpu": True}),
        yaml.safe_dump({key: value for key, value in values.items() if key != "debug"}),
        "- a list", "", "{",
    ):  # fmt: skip
        path.write_text(spoilt)
        assert not is_current(path, values)
    path.write_bytes(b"\xff")
    assert not is_current(path, values)
    assert not is_current(tmp_path / "none", values)


def test_the_default_location_is_accelerates_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default: Path
) -> None:
    assert default_location() == default
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_location() == tmp_path / "cache" / "huggingface" / "accelerate" / "default_config.yaml"
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert default_location() == tmp_path / "user" / "hf" / "accelerate" / "default_config.yaml"


def test_an_absent_default_is_written_and_is_then_ours(
    settings: Settings, generation: Generation, default: Path
) -> None:
    report = accelerate_config.configure(settings, generation)
    assert report.ok
    assert row(report).status is Status.PASS
    assert is_ours(default)
    assert yaml.safe_load(default.read_text()) == accelerate_config.fields(settings)
    assert not default.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    assert report.extra == {
        "config_file": str(generation.accelerate_config),
        "default_config": str(default),
    }


def test_our_own_default_is_brought_up_to_date_and_left_alone_when_it_is(
    settings: Settings, generation: Generation, default: Path
) -> None:
    accelerate_config.configure(settings, generation)
    os.utime(default, ns=(1, 1))
    accelerate_config.configure(settings, generation)
    assert default.stat().st_mtime_ns == 1
    newer = {**accelerate_config.fields(settings), "further": 1}
    generation.accelerate_config.write_text(yaml.safe_dump(newer))
    accelerate_config.configure(settings, generation)
    assert yaml.safe_load(default.read_text()) == newer


@pytest.mark.parametrize("content", [b"compute_environment: LOCAL_MACHINE\n", b"", b"\xff\xfe"])
def test_somebody_elses_default_is_named_and_left_alone(
    content: bytes, settings: Settings, generation: Generation, default: Path
) -> None:
    default.parent.mkdir(parents=True)
    default.write_bytes(content)
    report = accelerate_config.configure(settings, generation)
    assert row(report).status is Status.WARN
    assert str(default) in row(report).detail
    assert "--replace-default" in row(report).fix
    assert default.read_bytes() == content
    assert report.ok


def test_our_own_default_that_was_edited_is_somebody_elses(
    settings: Settings, generation: Generation, default: Path
) -> None:
    accelerate_config.configure(settings, generation)
    edited = default.read_text().replace("num_processes: 1", "num_processes: 2")
    default.write_text(edited)
    assert not is_ours(default)
    assert row(accelerate_config.configure(settings, generation)).status is Status.WARN
    assert default.read_text() == edited


def test_a_foreign_default_is_backed_up_before_it_is_replaced(
    settings: Settings, generation: Generation, default: Path
) -> None:
    default.parent.mkdir(parents=True)
    default.write_text("theirs")
    report = accelerate_config.configure(settings, generation, replace_default=True)
    assert row(report).status is Status.PASS
    assert backup(default).name in row(report).detail
    assert backup(default).read_text() == "theirs"
    assert original(backup(default)) == default
    assert is_ours(default)
    # Once it is ours the flag does nothing further.
    accelerate_config.configure(settings, generation, replace_default=True)
    assert backup(default).read_text() == "theirs"


def test_a_backup_is_never_overwritten(settings: Settings, generation: Generation, default: Path) -> None:
    default.parent.mkdir(parents=True)
    default.write_text("theirs, later")
    backup(default).write_text("theirs, earlier")
    with pytest.raises(UsageError, match="would be overwritten"):
        accelerate_config.configure(settings, generation, replace_default=True)
    assert default.read_text() == "theirs, later"
    assert backup(default).read_text() == "theirs, earlier"


def test_a_directory_at_the_default_path_is_left_alone(
    settings: Settings, generation: Generation, default: Path
) -> None:
    default.mkdir(parents=True)
    assert "is a directory" in row(accelerate_config.configure(settings, generation)).detail
    assert default.is_dir()


def test_a_dangling_link_at_the_default_path_is_left_alone(
    settings: Settings, generation: Generation, default: Path, tmp_path: Path
) -> None:
    default.parent.mkdir(parents=True)
    default.symlink_to(tmp_path / "nowhere")
    assert row(accelerate_config.configure(settings, generation)).status is Status.WARN
    assert default.is_symlink()


def test_a_default_that_cannot_be_written_does_not_stop_us(
    settings: Settings, generation: Generation, default: Path
) -> None:
    default.parent.parent.mkdir(parents=True)
    default.parent.write_text("a file where the directory belongs")
    report = accelerate_config.configure(settings, generation)
    assert row(report).status is Status.WARN
    assert "cannot be written" in row(report).detail
    assert report.ok


def test_an_environment_that_cannot_write_it_is_an_error_with_the_command_that_repairs_it(
    settings: Settings, tmp_path: Path
) -> None:
    broken = Generation(tmp_path / "broken")
    (broken.venv / "bin").mkdir(parents=True)
    broken.python.write_text(
        "#!/bin/sh\necho \"ModuleNotFoundError: No module named 'accelerate'\" >&2\nexit 1\n"
    )
    broken.python.chmod(0o755)
    with pytest.raises(StepFailed, match="No module named 'accelerate'") as caught:
        accelerate_config.configure(settings, broken)
    assert "invoke setup" in caught.value.fix


def test_what_accelerate_reads_back_differently_is_an_error(settings: Settings, tmp_path: Path) -> None:
    odd = Generation(tmp_path / "odd")
    (odd.venv / "bin").mkdir(parents=True)
    odd.python.write_text('#!/bin/sh\necho \'{"use_cpu": true, "mixed_precision": "MixedPrecision.NO"}\'\n')
    odd.python.chmod(0o755)
    with pytest.raises(StepFailed, match="use_cpu is True, not False") as caught:
        accelerate_config.configure(settings, odd)
    assert "mixed_precision" not in caught.value.what
