"""``invoke tensorboard``: which logs it shows, and that only this machine reaches it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.core.settings import Settings
from kohya_mps.train import tensorboard
from tests.support.stand_in_trainer import write_interpreter
from tests.support.training_runs import made


def test_a_project_shows_all_its_runs_and_a_run_shows_itself(tmp_path: Path) -> None:
    run = made(tmp_path)

    assert tensorboard.log_directory(tmp_path) == tmp_path / "runs"
    assert tensorboard.log_directory(run.path) == run.tensorboard


def test_a_settings_file_shows_its_latest_run(tmp_path: Path) -> None:
    (tmp_path / "train.toml").write_text("")
    run = made(tmp_path)

    assert tensorboard.log_directory(tmp_path / "train.toml") == run.tensorboard


def test_without_a_run_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        tensorboard.log_directory(tmp_path)


def test_the_environments_tensorboard_listens_on_this_machine_alone(
    installation: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path)
    arguments = tmp_path / "arguments.json"
    program = (
        f"import json, pathlib, sys\npathlib.Path({str(arguments)!r}).write_text(json.dumps(sys.argv[1:]))\n"
    )
    write_interpreter(installation, f"#!{sys.executable}\n{program}sys.exit(7)\n")

    assert tensorboard.serve(installation, run.path, 6007) == 7

    assert json.loads(arguments.read_text()) == [
        *("-m", "tensorboard.main", "--logdir", str(run.tensorboard)),
        *("--host", "127.0.0.1", "--port", "6007"),
    ]
    assert "http://127.0.0.1:6007/" in capfd.readouterr().err
