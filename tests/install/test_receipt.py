from __future__ import annotations

import datetime
import json
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.report import Check, Report, Status
from kohya_mps.install import accelerate_config, lockfile, receipt
from kohya_mps.install.checkout import Commits
from kohya_mps.install.generations import Generation
from kohya_mps.install.receipt import Receipt, Verdict

CHECK = Check("device", Status.PASS, "found cpu")
VERDICT = Verdict(True, "2026-01-02T03:04:05+00:00", "a training", "cpu", (CHECK,), (1.0, 0.5), True)
RECORD = Receipt(
    generation="one",
    profile="validated",
    lock="ab" * 32,
    python="3.11.9",
    interpreter="/usr/bin/python3.11",
    distributions={"plain": "1.0"},
    url="https://example.invalid/kohya_ss",
    commits=Commits("c" * 40, "d" * 40),
    mixed_precision="no",
    accelerate_config="ef" * 32,
    default_config_path="/home/somebody/default_config.yaml",
    default_config="",
    smoke=None,
    train_step=VERDICT,
    seconds={"checkout": 1.5},
    written="2026-01-02T03:04:05+00:00",
)


@pytest.fixture
def generation(tmp_path: Path) -> Generation:
    (tmp_path / "one").mkdir()
    return Generation(tmp_path / "one")


def test_a_receipt_is_read_as_it_was_written(generation: Generation) -> None:
    assert receipt.read(generation) is None
    receipt.save(generation, RECORD)
    assert receipt.read(generation) == RECORD


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\0\0\0\0", b"\xff", b"[]", b'{"generation": "one"}', b'{"generation":'], ids=repr
)  # fmt: skip
def test_a_broken_receipt_counts_as_none(content: bytes, generation: Generation) -> None:
    receipt.save(generation, RECORD)
    generation.receipt.write_bytes(content)
    assert receipt.read(generation) is None


def test_a_receipt_without_a_required_field_counts_as_none_and_a_further_field_is_no_error(
    generation: Generation,
) -> None:
    fields = msgspec.to_builtins(RECORD)
    generation.receipt.write_text(json.dumps({**fields, "of a later version": 1}))
    assert receipt.read(generation) == RECORD
    del fields["lock"]
    generation.receipt.write_text(json.dumps(fields))
    assert receipt.read(generation) is None


def test_a_verdict_keeps_what_the_report_says_and_when() -> None:
    extra = {"trainer": "a trainer", "device": "mps", "losses": [1.0, 0.5], "kohya_trainer_ran": True}
    made = receipt.verdict(Report("A title", (CHECK,), extra))
    assert (made.ok, made.what, made.device, made.checks) == (True, "a trainer", "mps", (CHECK,))
    assert (made.losses, made.kohya_trainer_ran) == ((1.0, 0.5), True)
    at = datetime.datetime.fromisoformat(made.at)
    assert at.utcoffset() == datetime.timedelta(0)
    assert abs(datetime.datetime.now(datetime.UTC) - at) < datetime.timedelta(minutes=1)


def test_a_failed_report_without_a_trainer_is_a_failed_verdict_with_its_title() -> None:
    made = receipt.verdict(Report("Smoke check", (CHECK, Check("start", Status.FAIL, "no"))))
    assert (made.ok, made.what, made.device, made.losses) == (False, "Smoke check", None, ())
    assert made.kohya_trainer_ran is False


def test_the_digests_are_of_the_files_and_empty_where_there_is_none_of_ours(
    generation: Generation, tmp_path: Path
) -> None:
    assert receipt.config_digest(generation) == ""
    generation.accelerate_config.write_text("use_cpu: false\n")
    assert receipt.config_digest(generation) == lockfile.digest(generation.accelerate_config)
    default = accelerate_config.default_location()
    assert receipt.default_digest(default) == ""
    accelerate_config.write_default(generation)
    assert receipt.default_digest(default) == lockfile.digest(default)
    default.write_text("theirs")
    assert receipt.default_digest(default) == ""
