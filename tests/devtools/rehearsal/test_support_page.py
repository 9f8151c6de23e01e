from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from devtools.rehearsal import matrix, support_page
from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Operator, Record
from devtools.rehearsal.support_page import Cell, Outcomes
from tests.support.rehearsal_records import CPU, GOOD


def test_a_training_without_a_record_failed() -> None:
    cell = support_page.cell("lora", Record("mps", "", (), 0.0, error="it ended without a record"), CPU)

    assert not cell.trains


def outcomes(profile: str, *cells: Cell) -> Outcomes:
    return Outcomes(profile, "sd15", "2026-11-23", {"torch": "2.5.1"}, cells[:1], cells[1:])


def test_the_table_says_predicted_and_gives_each_reason_once() -> None:
    trains = Cell("lora with AdamW", True, loss_difference=2e-7)
    slow = Cell("oft", True, on_cpu=("linalg_solve",), loss_difference=0.0)
    fails = Cell("fp16", False, "ValueError: fp16 (a.py:1)")
    everywhere = Cell("ia3", False, "TypeError: x (b.py:1)", everywhere=True)
    page = support_page.render(
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


def test_what_upstream_says_twice_is_written_once() -> None:
    both = Cell("fp8", False, "AssertionError: fp8 requires fp16 / fp8\u3092 (train_network.py:812)")

    assert "1. `AssertionError: fp8 requires fp16 (train_network.py:812)`" in support_page.render(
        [outcomes("a", both)]
    )


def replace_error(cell: Cell) -> Cell:
    """The same failure of another profile."""
    return Cell(cell.name, cell.trains, cell.error)


def test_losses_that_are_not_the_cpus_are_named_in_the_table() -> None:
    cell = support_page.cell("bf16", replace(GOOD, losses=(1.001, 0.5)), CPU)

    assert cell.loss_difference == pytest.approx(1e-3)
    assert "yes, losses 1e-03 from the CPU's" in support_page.render([outcomes("a", cell)])


def test_a_training_that_only_the_cpu_cannot_do_has_no_losses_to_compare() -> None:
    cell = support_page.cell("fp16", GOOD, replace(CPU, losses=(), error="RuntimeError: Half"))

    assert cell.trains
    assert "yes, the CPU cannot" in support_page.render([outcomes("a", cell)])


def test_the_page_in_the_repository_is_made_of_the_outcomes_in_it() -> None:
    assert support_page.PATH.read_text() == support_page.render(support_page.load(matrix.OUTCOMES))


def test_an_outcome_names_the_operators_that_the_cpu_would_compute_and_the_line_of_its_error() -> None:
    slow = replace(
        GOOD, operators=(*GOOD.operators, Operator("linalg_svd", Served.FALLBACK, 1, "train.py:4"))
    )
    failed = replace(slow, losses=(), error="RuntimeError: no\nsecond line", error_at="train.py:3")
    cell = support_page.cell("lora", failed, CPU)
    assert cell == Cell("lora", False, "RuntimeError: no (train.py:3)", False, ("linalg_svd",))
    assert support_page.cell("lora", failed, replace(CPU, error=failed.error)).everywhere


def test_losses_that_are_not_finite_have_a_difference_that_json_can_hold() -> None:
    assert support_page.cell("lora", replace(GOOD, losses=(math.nan, 0.5)), CPU).loss_difference == 1.0


def test_outcomes_read_back_as_they_were_written(tmp_path: Path) -> None:
    written = [outcomes("a", Cell("lora with AdamW", True, loss_difference=2e-7), Cell("oft", False, "no"))]
    (tmp_path / "outcomes.json").write_bytes(msgspec.json.encode(written))
    assert support_page.load(tmp_path / "outcomes.json") == written
    assert written[0].cell("oft") == Cell("oft", False, "no")
    assert written[0].cell("gone") is None
