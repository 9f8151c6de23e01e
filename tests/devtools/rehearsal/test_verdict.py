from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from devtools.rehearsal import verdict
from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Finding, Kind, Operator, Record
from kohya_mps.core.report import Check, Report, Status
from tests.support.rehearsal_records import CPU, FAILED, GOOD


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


def test_a_training_that_fails_names_the_line_and_the_log() -> None:
    found = row(judged(FAILED), "training")

    assert found.status is Status.FAIL
    assert found.detail == "RuntimeError: no (at train.py:3)"
    assert "log" in found.fix


def test_a_failure_that_the_cpu_shares_is_reported_as_such() -> None:
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


def test_nothing_is_compared_where_one_of_the_two_did_not_train() -> None:
    assert row(judged(FAILED), "losses").status is Status.SKIP
    assert row(judged(GOOD, replace(CPU, error="RuntimeError: Half")), "losses").status is Status.SKIP


def test_a_difference_is_relative_and_of_a_zero_absolute() -> None:
    assert verdict.difference(replace(GOOD, losses=(2.2, 0.5)), replace(CPU, losses=(2.0, 0.5))) == (
        pytest.approx(0.1)
    )
    assert verdict.difference(replace(GOOD, losses=(0.25,)), replace(CPU, losses=(0.0,))) == 0.25


def test_without_an_operator_on_the_device_there_is_nothing_to_count() -> None:
    assert row(judged(replace(GOOD, operators=())), "operators").status is Status.SKIP


def test_only_the_same_error_is_shared_with_the_cpu() -> None:
    assert not verdict.same_error(GOOD, CPU)
    assert not verdict.same_error(FAILED, replace(CPU, error="ValueError: other"))


def test_a_finding_that_happened_once_has_no_count() -> None:
    once = replace(GOOD, findings=(Finding(Kind.FALLBACK, "linalg_svd", "a.py:9", 1),))
    often = replace(GOOD, findings=(Finding(Kind.FALLBACK, "linalg_svd", "a.py:9", 4),))
    assert row(judged(once), Kind.FALLBACK).detail == "linalg_svd at a.py:9"
    assert row(judged(often), Kind.FALLBACK).detail == "linalg_svd at a.py:9 (4 times)"
