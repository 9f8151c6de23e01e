"""The report of a rehearsal, and the table of many."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from devtools.rehearsal import matrix, record, runner, table, verdict
from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Finding, Kind, Operator, Record
from devtools.rehearsal.table import Cell, Outcomes
from kohya_mps.core.report import Check, Report, Status

CPU = Record("cpu", "2.5.1", (1.0, 0.5), 1.0)
GOOD = Record(
    "mps",
    "2.5.1",
    (1.0000001, 0.5),
    2.0,
    operators=(
        Operator("add.Tensor", Served.KERNEL, 7, "train.py:1"),
        Operator("convolution", Served.COMPOSITE, 2, "train.py:2", "_mps_convolution"),
    ),
)
FAILED = replace(GOOD, losses=(), error="RuntimeError: no", error_at="train.py:3")


def judged(simulated: Record, on_cpu: Record = CPU, **options: Any) -> Report:
    return verdict.report(
        "lora", "validated", simulated, on_cpu, **{"fallback": False, "logs": {"mps": "log"}, **options}
    )


def row(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_training_with_the_losses_of_the_cpu_is_good_and_predicted() -> None:
    report = judged(GOOD)

    assert report.ok
    assert "predicted" in report.title
    assert any("no MPS device was seen" in line for line in report.summary)
    assert "convolution: composite by _mps_convolution, 2 times, first at train.py:2" in report.summary


@pytest.mark.parametrize("losses", [(1.0, 0.50001), (1.0,), (), (1.0, math.nan)])
def test_other_losses_than_the_cpus_are_a_failure(losses: tuple[float, ...]) -> None:
    assert row(judged(replace(GOOD, losses=losses)), "losses").status is Status.FAIL


@pytest.mark.parametrize(("difference", "status"), [(1e-3, Status.PASS), (1e-2, Status.FAIL)])
def test_half_precision_is_compared_as_half_precision(difference: float, status: Status) -> None:
    near = replace(GOOD, losses=(1.0 + difference, 0.5))

    assert row(judged(near, precision="bf16"), "losses").status is status


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


def test_a_training_that_fails_names_the_place_and_the_log() -> None:
    found = row(judged(FAILED), "training")

    assert found.status is Status.FAIL
    assert found.detail == "RuntimeError: no (at train.py:3)"
    assert "log" in found.fix


def test_a_failure_that_the_cpu_shares_is_told_as_such() -> None:
    on_cpu = replace(CPU, error=FAILED.error)

    assert "the CPU says the same" in row(judged(FAILED, on_cpu), "training").detail


@pytest.mark.parametrize(("fallback", "status"), [(False, Status.FAIL), (True, Status.WARN)])
def test_a_missing_operator_fails_without_the_fallback(fallback: bool, status: Status) -> None:
    missing = replace(GOOD, operators=(Operator("linalg_eig", Served.MISSING, 1, "a.py:1"),))

    found = row(judged(missing, fallback=fallback), "operators")

    assert found.status is status
    assert "linalg_eig" in found.fix


@pytest.mark.parametrize(
    ("finding", "error", "status"),
    [
        (Finding(Kind.CUDA, "torch.cuda.get_rng_state", "a.py:9", 1, "AssertionError: x"), "x", Status.FAIL),
        (Finding(Kind.CUDA, "torch.cuda.get_rng_state", "a.py:9", 1, "AssertionError: x"), "", Status.WARN),
        (Finding(Kind.CUDA, "torch.cuda.manual_seed_all", "a.py:9", 1), "", Status.PASS),
        (Finding(Kind.FALLBACK, "linalg_svd", "a.py:9", 4), "", Status.WARN),
    ],
)
def test_a_finding_is_a_row_with_its_line(finding: Finding, error: str, status: Status) -> None:
    found = row(judged(replace(GOOD, error=error, findings=(finding,))), finding.kind)

    assert found.status is status
    assert f"{finding.what} at a.py:9" in found.detail


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    full = replace(FAILED, findings=(Finding(Kind.MIXED, "add.Tensor", "a.py:1", 2, "RuntimeError: x"),))

    record.write(tmp_path / "record.json", full)

    assert record.read(tmp_path / "record.json") == full


def test_a_training_without_a_record_failed() -> None:
    cell = table.cell("lora", Record("mps", "", (), 0.0, error="it ended without a record"), CPU)

    assert not cell.trains


def outcomes(profile: str, *cells: Cell) -> Outcomes:
    return Outcomes(profile, "sd15", "2026-11-23", {"torch": "2.5.1"}, cells[:1], cells[1:])


def test_the_table_says_predicted_and_gives_each_reason_once() -> None:
    trains = Cell("lora with AdamW", True, loss_difference=2e-7)
    slow = Cell("oft", True, on_cpu=("linalg_solve",), loss_difference=0.0)
    fails = Cell("fp16", False, "ValueError: fp16 (a.py:1)")
    everywhere = Cell("ia3", False, "TypeError: x (b.py:1)", everywhere=True)
    page = table.render(
        [outcomes("a", trains, slow, fails, everywhere), outcomes("b", trains, slow, replace_error(fails))]
    )

    assert "**predicted**" in page
    assert "| lora with AdamW | yes | yes |" in page
    assert "| oft | yes (linalg_solve on the CPU) | yes (linalg_solve on the CPU) |" in page
    assert "| fp16 | no [1] | no [1] |" in page
    assert "| ia3 | no, nor on the CPU [2] |  |" in page
    assert page.count("`ValueError: fp16 (a.py:1)`") == 1
    assert "4 of 7 trainings came to their end" in page
    assert "they differ by at most 2e-07 relative" in page


def test_what_upstream_says_twice_is_told_once() -> None:
    both = Cell("fp8", False, "AssertionError: fp8 requires fp16 / fp8\u3092 (train_network.py:812)")

    assert "1. `AssertionError: fp8 requires fp16 (train_network.py:812)`" in table.render(
        [outcomes("a", both)]
    )


def replace_error(cell: Cell) -> Cell:
    """The same failure of another profile."""
    return Cell(cell.name, cell.trains, cell.error)


def test_losses_that_are_not_the_cpus_are_told_in_the_table() -> None:
    cell = table.cell("bf16", replace(GOOD, losses=(1.001, 0.5)), CPU)

    assert cell.loss_difference == pytest.approx(1e-3)
    assert "yes, losses 1e-03 from the CPU's" in table.render([outcomes("a", cell)])


def test_a_training_that_only_the_cpu_cannot_do_has_no_losses_to_compare() -> None:
    cell = table.cell("fp16", GOOD, replace(CPU, losses=(), error="RuntimeError: Half"))

    assert cell.trains
    assert "yes, the CPU cannot" in table.render([outcomes("a", cell)])


def test_the_page_in_the_repository_is_made_of_the_outcomes_in_it() -> None:
    assert table.PATH.read_text() == table.render(table.load(matrix.OUTCOMES))


def test_the_outcomes_are_those_of_the_trainings_that_are_rehearsed() -> None:
    """A renamed or removed training would leave a row that nothing stands behind."""
    known = runner.trainings()
    for one in table.load(matrix.OUTCOMES):
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


def test_what_follows_a_second_dash_dash_is_the_trainers() -> None:
    options = runner.parse_options(["--network", "loha", "--fallback", "--", "--loss_type", "huber"])

    assert (options.network, options.fallback) == ("loha", True)
    assert options.arguments == ("--loss_type", "huber")


def test_the_built_in_training_has_no_options_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        runner.parse_options(["--builtin", "--", "--loss_type", "huber"])

    assert stop.value.code == 2
    assert "--builtin takes none of the trainer's options" in capsys.readouterr().err
