from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from devtools.rehearsal import matrix, runner, support_page
from devtools.rehearsal.runner import Stage
from devtools.rehearsal.support_page import Cell, Outcomes
from kohya_mps.core import settings
from kohya_mps.core.report import Status
from tests.support.rehearsal_stage import make_stage


def test_the_outcomes_are_those_of_the_trainings_that_are_rehearsed() -> None:
    """A renamed or removed training would leave a row that nothing stands behind."""
    known = runner.trainings()
    for one in support_page.load(matrix.OUTCOMES):
        combined = [cell.name for cell in one.combinations]
        everything = [t.name for t in matrix.combinations(known, one.family, thorough=True)]
        least = {t.name for t in matrix.combinations(known, one.family, thorough=False)}
        assert least <= set(combined) and combined == [name for name in everything if name in combined]
        assert [cell.name for cell in one.options] == [
            t.name for t in matrix.option_trainings(known, one.family)
        ]


def test_each_network_and_each_optimizer_is_met_and_thoroughly_each_by_each() -> None:
    known = runner.trainings()

    once = [one.name for one in matrix.combinations(known, "sdxl", thorough=False)]
    every = [one.name for one in matrix.combinations(known, "sdxl", thorough=True)]

    assert len(once) == len(known.networks) + len(known.optimizers) - 1
    assert {"lora with Lion", "oft with AdamW"} < set(once)
    assert len(every) == len(known.networks) * len(known.optimizers)


def test_a_training_gets_no_more_memory_than_its_share() -> None:
    jobs = psutil.virtual_memory().available // 1_000_000_000
    take = [sys.executable, "-c", "taken = bytearray(1_500_000_000)"]

    with matrix.memory_shared(jobs):
        refused = subprocess.run(take, check=False, capture_output=True, text=True)

    assert "MemoryError" in refused.stderr
    subprocess.run(take, check=True)


def test_an_option_stands_alone_with_the_plainest_network_and_optimizer() -> None:
    known = runner.trainings()

    validation = next(one for one in matrix.option_trainings(known, "sd15") if one.name == "validation")

    assert validation.arguments[-4:] == ("--validation_split", "0.5", "--validate_every_n_steps", "2")
    assert {"networks.lora", "AdamW"} < set(validation.arguments)


OPTIONS = matrix.MatrixOptions(("validated",), ("sd15",), 1, "lokr with AdamW")


def test_a_training_that_has_its_records_is_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, chosen = make_stage(tmp_path), settings.load(profile="validated")
    first = matrix.rehearse_family(stage, chosen, "sd15", OPTIONS)
    assert [cell.name for cell in first.combinations] == ["lokr with AdamW"]
    assert first.combinations[0].trains
    assert set(first.versions) >= {"torch", "lycoris-lora"}
    assert "1 trainings, 1 of them to be rehearsed" in capsys.readouterr().err
    assert matrix.rehearse_family(stage, chosen, "sd15", OPTIONS) == first
    assert "1 trainings, 0 of them to be rehearsed" in capsys.readouterr().err


def test_only_records_and_logs_are_kept(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    matrix.rehearse_family(stage, settings.load(profile="validated"), "sd15", OPTIONS)
    kept = {path.name for path in (stage.work / "matrix").rglob("*") if path.is_file()}
    assert kept == {"record.json", "trainer.log"}


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A session on the stand-in, which writes its page and its outcomes to the test's directory."""
    stage = make_stage(tmp_path)
    monkeypatch.setattr(runner, "prepare", lambda _settings, builtin: stage)
    monkeypatch.setattr("devtools.sandbox.SANDBOX", tmp_path / "sandbox")
    monkeypatch.setattr(matrix, "OUTCOMES", tmp_path / "outcomes.json")
    monkeypatch.setattr(support_page, "PATH", tmp_path / "mps-support.md")
    return stage


def test_a_part_of_the_trainings_writes_no_page(session: Stage, tmp_path: Path) -> None:
    report = matrix.rehearse(OPTIONS)
    assert [check.detail for check in report.checks] == ["1 of 1 train"]
    assert not matrix.OUTCOMES.exists()


def test_all_trainings_write_the_outcomes_and_the_page_of_them(
    session: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = runner.Trainings(
        trainers={"sd15": "train_network.py"},
        networks={"lora": ("--network_module", "networks.lora")},
        optimizers={"AdamW": ("--optimizer_type", "AdamW")},
        options={"good": ("good",), "bad": ("fails",), "other": ("differs",)},
    )
    monkeypatch.setattr(runner, "trainings", lambda: few)
    (check,) = matrix.rehearse(matrix.MatrixOptions(("validated",), ("sd15",), 2)).checks
    assert check.status is Status.WARN
    assert check.detail == "3 of 4 train; losses are not the CPU's: other"
    (outcomes,) = support_page.load(matrix.OUTCOMES)
    assert [cell.trains for cell in outcomes.cells] == [True, True, False, True]
    assert support_page.PATH.read_text(encoding="utf-8") == support_page.render([outcomes])


def made(profile: str, family: str, name: str = "lora") -> Outcomes:
    return Outcomes(profile, family, "2026-11-23", {}, (Cell(name, True),), ())


def test_new_outcomes_replace_those_of_their_profile_and_family_alone() -> None:
    old = [
        made("validated", "sd15", "old"),
        made("validated", "sdxl"),
        made("a profile that is gone", "sd15"),
    ]
    new = [made("validated", "sd15", "new"), made("latest", "sd15")]
    assert matrix.merged(old, new) == [new[1], new[0], old[1]]


def test_half_precision_may_differ_more_before_it_is_named() -> None:
    near = Outcomes(
        "validated", "sd15", "", {}, (), (Cell("mixed precision fp16", True, loss_difference=1e-3),)
    )
    full = Outcomes("validated", "sd15", "", {}, (), (Cell("min-SNR weighting", True, loss_difference=1e-3),))
    assert matrix.judge(near).status is Status.PASS
    assert matrix.judge(full).status is Status.WARN
