from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest

from devtools import posargs, sandbox
from devtools.bench import parts
from devtools.chaos import faults
from devtools.locks import audit, cross_check, make, upstream
from devtools.rehearsal import matrix, runner, wheel
from kohya_mps.core.errors import UsageError
from kohya_mps.core.report import Check, Report, Status

PARSERS: dict[str, Callable[[Sequence[str]], object]] = {
    "audit": audit.parse_options,
    "bench": parts.parse_options,
    "chaos": faults.parse_options,
    "cross_check": cross_check.parse_options,
    "lock": make.parse_options,
    "rehearse": runner.parse_options,
    "rehearse_data": wheel.parse_options,
    "rehearse_matrix": matrix.parse_options,
    "train_step": sandbox.parse_options,
    "upstream": upstream.parse_options,
}


def report(status: Status) -> Report:
    return Report("A session", (Check("one", status, "what was found"),))


@pytest.mark.parametrize("session", PARSERS)
def test_the_help_of_a_session_shows_the_command_as_it_is_typed(
    session: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSERS[session](["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: nox -s {session} -- ")
    assert "--json" in printed


@pytest.mark.parametrize("session", PARSERS)
def test_an_option_that_a_session_does_not_have_ends_with_2(
    session: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSERS[session](["--jso"])
    assert ended.value.code == 2
    assert f"nox -s {session} --: error: unrecognized arguments: --jso" in capsys.readouterr().err


def test_json_goes_to_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parser = posargs.parser("some", "Do something.")
    posargs.run(["--json"], parser.parse_args, lambda _: report(Status.PASS))
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True
    assert printed["checks"][0]["name"] == "one"


def test_a_report_that_is_not_good_ends_a_session_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        posargs.run([], posargs.parser("some", "Do something.").parse_args, lambda _: report(Status.FAIL))
    assert ended.value.code == 1
    assert "what was found" in capsys.readouterr().out


def test_an_error_in_the_arguments_ends_with_2_and_is_printed_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def parse(arguments: Sequence[str]) -> None:
        raise UsageError(f"no such lock: {arguments[0]}", "accepted: train")

    with pytest.raises(SystemExit) as ended:
        posargs.run(["gone", "--json"], parse, lambda _: report(Status.PASS))
    assert ended.value.code == 2
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert (check["detail"], check["fix"]) == ("no such lock: gone", "accepted: train")


def test_what_follows_a_second_double_dash_is_not_the_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    posargs.run(["--", "--json"], list, lambda _: report(Status.PASS))
    assert not capsys.readouterr().out.startswith("{")


def test_the_locks_that_exist_stand_in_the_help_and_are_read_in_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = posargs.parser("some", "Do something.")
    posargs.add_locks(parser, ["train", "gui"])
    assert parser.parse_args(["gui", "train", "--json"]).names == ["gui", "train"]
    assert parser.parse_args([]).names == []
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "one of train, gui; all if left out" in capsys.readouterr().out
