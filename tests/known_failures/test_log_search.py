"""Explaining logs of any size: wrapped, coloured, redrawn, and cut into pieces anywhere."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kohya_mps.core.errors import UsageError
from kohya_mps.core.report import Check, Status, to_json
from kohya_mps.core.settings import ROOT
from kohya_mps.known_failures import catalogue, log_search
from kohya_mps.known_failures.catalogue import Failure, LogPattern, source_url

FP16 = b"ValueError: fp16 mixed precision requires a GPU (not 'mps')."


def found(log: bytes) -> list[tuple[str, int]]:
    return [(f.failure.id, f.line) for f in log_search.search(io.BytesIO(log)).found]


def test_colours_wrapping_and_redraws_do_not_hide_a_failure() -> None:
    coloured = (
        b"\x1b[1;31mValueError\x1b[0m: fp16 mixed \x1b[2mprecision\x1b[0m requires a\n   GPU (not\r\n 'mps')."
    )
    in_columns = (
        b"2026-11-23 16:36:01 ERROR    No data found. Please verify   train_network.py:563\n"
        b"                             arguments (train_data_dir must                     \n"
    )
    redrawn = b"steps: 1%\rsteps: 2%, avr_loss=nan\rsteps: 3%, avr_loss=nan\r"

    assert found(coloured) == [("fp16", 1)]
    assert found(in_columns) == [("no-pictures", 1)]
    assert found(b"a\nb\n" + redrawn) == [("half-precision-vae", 3)]


def test_the_latest_failure_comes_first_with_its_last_line() -> None:
    log = FP16 + b"\nagain\n" + FP16 + b"\nNo module named 'xformers'\n"

    assert found(log) == [("xformers", 4), ("fp16", 3)]
    assert found(b"No data found. Please verify arguments\nignore directory without repeats\n") == [
        ("no-pictures", 2)
    ]
    assert found(b"ignore directory without repeats\nNo data found. Please verify arguments\n") == [
        ("no-pictures", 2)
    ]


@pytest.mark.parametrize("offset", [0, 1, 100, 16 * 1024, (1 << 20) - 30, 1 << 20, (1 << 20) + 5])
def test_a_failure_is_found_wherever_the_pieces_are_cut(offset: int) -> None:
    log = b"x" * offset + b"\n" + FP16 + b"\n" + b"y\n" * 700_000

    assert found(log) == [("fp16", 2)]


def test_what_stands_before_decides_between_two_failures_with_one_message() -> None:
    message = b"\nAssertionError: Torch not compiled with CUDA enabled\n"

    assert found(b"in switch_rng_state" + message) == [("validation-on-mps", 2)]
    assert found(b"in sample_images" + message) == [("sampling-with-old-scripts", 2)]
    assert found(b"in sample_images" + b"." * 5000 + message) == [("cuda-asked-for", 2)]


def test_of_two_entries_that_one_line_shows_the_specific_one_is_reported() -> None:
    log = b"ImportError: cannot import name 'cached_download' from 'huggingface_hub'"

    assert found(log) == [("hub-cached-download", 1)]


def test_the_last_error_of_an_unknown_failure_is_reported() -> None:
    report = log_search.report(
        log_search.search(io.BytesIO(b"KeyError: 'a'\n  x\nfoo.BarError: what\n")), "a.log"
    )

    assert report.checks == (
        Check("known failures", Status.SKIP, "none in 3 lines; the last error: foo.BarError: what"),
    )
    assert report.extra == {"log": "a.log", "failures": [], "last_error": "foo.BarError: what", "lines": 3}
    assert report.summary == ("`invoke doctor` looks at the machine and the installation.",)


def test_a_log_without_any_error_has_none() -> None:
    report = log_search.report(log_search.search(io.BytesIO(b"all is well\n")), "a.log")

    assert report.title == "Known failures in a.log"
    assert report.checks[0].detail == "none in 1 lines"


def test_cause_remedy_and_source_are_reported() -> None:
    report = log_search.report(log_search.search(io.BytesIO(FP16)), "a.log")

    assert report.ok
    assert (report.checks[0].name, report.checks[0].status) == ("line 1", Status.WARN)
    assert "accelerate before 1.11.0 refuses fp16" in report.checks[0].detail
    assert 'mixed_precision = "no"' in report.checks[0].fix
    assert "https://github.com/huggingface/accelerate/issues/3718" in report.checks[0].fix
    assert source_url("CVE-2025-32434") == ""
    fp16 = next(failure for failure in catalogue.known() if failure.id == "fp16")
    assert report.extra["failures"] == [
        {
            "id": "fp16",
            "line": 1,
            "text": FP16.decode(),
            "cause": fp16.cause,
            "remedy": fp16.remedy,
            "sources": fp16.sources,
        }
    ]
    assert report.summary == ()


def test_a_failure_without_a_source_shows_none() -> None:
    own = Failure("x", "seen", "cause", "remedy", (), log=(LogPattern("it broke here"),))
    found = log_search.search(io.BytesIO(b"it broke here"), (own,))

    assert log_search.report(found, "a.log").checks[0].fix == "remedy"


@pytest.mark.slow
def test_fifty_megabytes_take_less_than_five_seconds_and_constant_memory(tmp_path: Path) -> None:
    line = b"2026-01-01 INFO epoch is incremented.  torch module named accelerator  device\n"
    redraw = "steps:  12%|█▏ | 123/1000 [01:23<10:11,  1.43it/s, avr_loss=0.0823]\r".encode()
    log = tmp_path / "big.log"
    with log.open("wb") as file:
        for _ in range(50):
            file.write((line * 7000 + redraw * 7500)[: 1 << 20])
        file.write(FP16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    report = log_search.explain(str(log))

    # The time of this process alone: other tests may be at work on the machine.
    assert time.process_time() - started < 5
    assert report.extra["failures"][0]["id"] == "fp16"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 30e6


@hypothesis_settings(deadline=None)
@given(log=st.lists(st.binary(max_size=40) | st.sampled_from([b"\x1b[", b"\r", b"\n", FP16])).map(b"".join))
def test_any_bytes_are_explained_or_not(log: bytes) -> None:
    explanation = log_search.search(io.BytesIO(log))

    to_json(log_search.report(explanation, "a.log"))
    assert explanation.lines == log.count(b"\n")
    if FP16 in log and b"\x1b" not in log:
        assert "fp16" in {f.failure.id for f in explanation.found}


def test_a_missing_log_and_no_log_at_all_are_usage_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/nowhere/a.log", "/", "a\0b"):
        with pytest.raises(UsageError, match="cannot be read"):
            log_search.explain(path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(UsageError, match="no log") as caught:
        log_search.explain("-")
    assert caught.value.fix == "`invoke explain LOG`, or pipe one into `invoke explain -`"


@pytest.mark.parametrize("arguments", [["LOG"], ["--json", "LOG"], ["-"], ["-", "--json"]])
def test_invoke_takes_a_log_or_standard_input(arguments: list[str], tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_bytes(FP16)
    typed = [str(log) if word == "LOG" else word for word in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "invoke", "explain", *typed],
        cwd=ROOT,
        input=FP16,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert b"fp16 mixed precision requires a GPU" in done.stdout


def test_a_failure_of_another_device_is_not_reported_here(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "accelerator device: cpu"
    monkeypatch.setattr(log_search, "expected_device", lambda: "cpu")
    assert not log_search.print_known_failures(line)

    monkeypatch.setattr(log_search, "expected_device", lambda: "mps")
    assert log_search.print_known_failures(line)


def test_the_end_of_a_failed_program_is_explained_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert log_search.print_known_failures("noise\n" + FP16.decode())
    assert not log_search.print_known_failures("noise")
    captured = capsys.readouterr()

    assert captured.out == ""
    fp16 = next(failure for failure in catalogue.known() if failure.id == "fp16")
    assert captured.err == (
        f"\nknown failure: {FP16.decode()}\n  why:   {fp16.cause}\n  fix:   {fp16.remedy}\n"
        f"  from:  {', '.join(fp16.sources)}\n"
    )
