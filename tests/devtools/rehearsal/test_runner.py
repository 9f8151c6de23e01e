from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from devtools.rehearsal import request, runner
from devtools.rehearsal.runner import Stage, Training
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Status
from tests.support.rehearsal_stage import make_stage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "no"),
        (("--save_precision", "fp16"), "no"),
        (("--mixed_precision", "fp16", "--mixed_precision", "bf16"), "bf16"),
    ],
)
def test_the_last_mixed_precision_counts(arguments: tuple[str, ...], expected: str) -> None:
    assert runner.precision(runner.Training("lora", "sd15", arguments), "no") == expected


def test_what_follows_a_second_dash_dash_is_the_trainers() -> None:
    options = runner.parse_options(["--network", "loha", "--fallback", "--", "--loss_type", "huber"])

    assert (options.network, options.fallback) == ("loha", True)
    assert options.arguments == ("--loss_type", "huber")


def test_the_built_in_training_has_no_options_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runner.parse_options(["--builtin", "--", "--loss_type", "huber"])

    assert stop.value.code == 2
    assert "--builtin takes none of the trainer's options" in capsys.readouterr().err


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make_stage(tmp_path)


PLAIN = Training("lora with AdamW", "sdxl", ("--sample_prompts", "{prompts}"))


def test_both_devices_get_the_same_training_with_pictures_of_their_own(stage: Stage) -> None:
    simulated, on_cpu = runner.requests(stage, PLAIN, stage.work / "one", fallback=True)
    assert (simulated.device, on_cpu.device) == ("mps", "cpu")
    assert simulated.script == str(stage.sd_scripts) + "/sdxl_train_network.py"
    for each in (simulated, on_cpu):
        output = stage.work / "one" / each.device
        arguments = dict(zip(each.arguments, each.arguments[1:], strict=False))
        assert arguments["--train_data_dir"] == str(output / "pictures")
        assert (output / "pictures" / "2_shapes" / "0.txt").is_file()
        assert Path(arguments["--sample_prompts"]).read_text(encoding="utf-8").startswith("a red circle")
        assert each.small and each.fallback
    there, here = (str(stage.work / "one" / device) for device in ("mps", "cpu"))
    assert tuple(part.replace(there, here) for part in simulated.arguments) == on_cpu.arguments


def test_the_built_in_step_needs_no_trainer(stage: Stage) -> None:
    training = Training("lora with AdamW", "", ("lora", "AdamW", "3"))
    request_, _ = runner.requests(stage, training, stage.work / "one", fallback=False)
    assert request_.script.endswith("builtin_step.py")
    assert request_.arguments[-3:] == ("lora", "AdamW", "3")
    assert not request_.small


def test_what_is_left_of_an_earlier_rehearsal_is_removed(stage: Stage) -> None:
    left = stage.work / "one" / "mps" / "record.json"
    left.parent.mkdir(parents=True)
    left.touch()
    runner.requests(stage, PLAIN, stage.work / "one", fallback=False)
    assert not left.exists()


def test_the_records_of_a_run_are_read_and_a_missing_one_names_the_log(stage: Stage) -> None:
    pair = runner.requests(stage, PLAIN, stage.work / "one", fallback=False)
    died = runner.requests(stage, Training("dying", "sd15", ("dies",)), stage.work / "two", fallback=False)
    runner.run(stage, [*pair, *died], jobs=1)
    assert runner.result(pair[0]).losses == (1.0, 0.5)
    assert runner.result(died[0]).error == f"it ended without a record; its log: {died[0].log}"
    assert not runner.result(died[1]).error


def test_a_rehearsal_that_cannot_start_is_an_error_with_its_last_line(tmp_path: Path, stage: Stage) -> None:
    (tmp_path / "broken").mkdir()
    broken = make_stage(tmp_path / "broken", "raise SystemExit('No module named torch')\n")
    pair = runner.requests(stage, PLAIN, stage.work / "one", fallback=False)
    with pytest.raises(StepFailed, match="could not start: No module named torch"):
        runner.run(broken, pair, jobs=1)


def test_without_a_request_nothing_is_started(tmp_path: Path) -> None:
    runner.run(make_stage(tmp_path, "raise SystemExit(1)\n"), [], jobs=1)


def test_pictures_are_made_once_and_a_failure_leaves_none(tmp_path: Path, stage: Stage) -> None:
    made = runner.prepare_pictures(stage)
    (made / "mine").touch()
    assert (runner.prepare_pictures(stage) / "mine").exists()
    (tmp_path / "broken").mkdir()
    broken = make_stage(tmp_path / "broken", "raise SystemExit('no Pillow')\n")
    with pytest.raises(StepFailed, match="no Pillow"):
        runner.prepare_pictures(broken)
    assert not list(broken.work.glob("pictures-*"))


@pytest.fixture
def prepared(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The stage that a session prepares: the real one is gigabytes."""
    monkeypatch.setattr(runner, "prepare", lambda _settings, builtin: stage)
    monkeypatch.setattr("devtools.sandbox.SANDBOX", tmp_path / "sandbox")
    return stage


def test_the_session_compares_both_devices_and_passes_options_on(prepared: Stage) -> None:
    report = runner.rehearse(runner.parse_options(["--family", "sdxl"]))
    assert report.ok
    assert "Rehearsal (predicted) of lora with AdamW" in report.title
    failed = runner.rehearse(runner.parse_options(["--", "fails"]))
    assert [check.status for check in failed.checks][:2] == [Status.FAIL, Status.SKIP]
    written = json.loads((prepared.work / "requests.json").read_text(encoding="utf-8"))
    assert written[0]["arguments"][-1] == "fails"


def test_a_network_that_the_built_in_step_lacks_is_refused(prepared: Stage) -> None:
    with pytest.raises(UsageError, match="no network 'oft'"):
        runner.rehearse(runner.parse_options(["--builtin", "--network", "oft"]))
    assert runner.rehearse(runner.parse_options(["--builtin"])).ok
    assert request.read(prepared.work / "requests.json")[0].script.endswith("builtin_step.py")


def test_a_mac_has_the_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from kohya_mps.core import settings

    monkeypatch.setattr(runner, "on_mac", lambda: True)
    with pytest.raises(UsageError, match="real device") as refusal:
        runner.prepare(settings.load(profile="validated"), builtin=True)
    assert "nox -s train_step" in refusal.value.fix


def test_a_torch_without_operator_data_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kohya_mps.core import settings

    monkeypatch.setattr("devtools.rehearsal.operators.DATA", tmp_path)
    monkeypatch.setattr(runner, "on_mac", lambda: False)
    with pytest.raises(UsageError, match="no operator data for torch") as refusal:
        runner.prepare(settings.load(profile="validated"), builtin=True)
    assert refusal.value.fix == "`nox -s rehearse_data -- validated`"


def test_the_program_of_the_simulation_has_no_relative_import() -> None:
    """It is started by its folder, and then it is in no package."""
    tree = ast.parse((runner.SIMULATION / "__main__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imports
    assert not [node.module for node in imports if node.level]
