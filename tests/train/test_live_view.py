"""The progress view: read from the files of a run, on a terminal and without one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from kohya_mps.train import live_view
from kohya_mps.train.live_view import Tail, View
from kohya_mps.train.runs import Begun, Resumption, Run, Step
from tests.support.training_runs import made, step_line


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = made(tmp_path)
    run.begun_file.write_text('{"total": 40, "device": "cpu", "processes": 1, "pid": 1}')
    return run


def steps(run: Run, *lines: str) -> list[Step]:
    run.steps_file.write_text("".join(lines))
    return run.steps()


def test_a_line_is_read_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    tail = Tail(path)
    assert tail.lines() == []

    path.write_bytes(b"one\ntw")
    assert tail.lines() == [b"one"]
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert tail.lines() == [b"two", b"three"]


def test_a_pause_before_a_resumption_does_not_change_the_pace(run: Run) -> None:
    lines = [step_line(n) for n in range(1, 10)] + [step_line(n, seconds=300) for n in range(10, 11)]

    assert live_view.pace(steps(run, *lines)) == pytest.approx(0.5)


def test_the_time_left_follows_from_the_pace(run: Run) -> None:
    made_steps = steps(run, *[step_line(n) for n in range(1, 21)])
    view = View(run, Begun(40, "cpu", 1, 1), made_steps)

    assert view.left() == pytest.approx(10.0)


def test_the_time_left_has_room_for_as_many_samples_as_there_were(run: Run) -> None:
    # One step of ten draws samples, which takes nine seconds more.
    times = [n * 0.5 + (9 if n > 10 else 0) + (9 if n > 20 else 0) for n in range(1, 22)]
    lines = [step_line(n, seconds=time / n) for n, time in enumerate(times, 1)]
    view = View(run, Begun(41, "cpu", 1, 1), steps(run, *lines))

    assert view.left() == pytest.approx(20 * (0.5 + 0.9), rel=1e-6)


def test_a_night_before_a_resumption_counts_neither_as_elapsed_nor_as_left(run: Run) -> None:
    night = [step_line(n, seconds=0.5 + 40_000 / n) for n in range(11, 21)]
    run.save(
        msgspec.structs.replace(run.record(), resumed=(Resumption("2026-01-02T14:00:00+00:00", 10, "g"),))
    )
    view = View(run, Begun(40, "cpu", 1, 1), steps(run, *[step_line(n) for n in range(1, 11)], *night))

    assert sum(view.durations()) == pytest.approx(9.0, rel=1e-3)
    assert view.left() == pytest.approx(10.0, rel=1e-3)


def test_the_curve_falls_when_the_loss_falls(run: Run) -> None:
    curve = View(run, None, steps(run, *[step_line(n) for n in range(1, 100)])).loss_curve()

    assert curve[0] == "█"
    assert curve[-1] == "▁"


def test_without_a_terminal_there_are_plain_lines_and_the_last_step_is_printed(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    steps(run, *[step_line(n) for n in range(1, 41)])
    running = iter([True, True, False])

    live_view.show(run, lambda: next(running))

    err = capsys.readouterr().err
    assert "training 40 steps on cpu" in err
    assert "step 40/40, epoch 5, loss 0.0250" in err
    assert "2.00 GB" in err
    assert "\x1b" not in err


def test_the_live_view_shows_where_the_training_is(run: Run) -> None:
    view = View(run, run.begun(), steps(run, *[step_line(n) for n in range(1, 11)]))
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115

    console.print(live_view.panel(view))

    text = console.export_text()
    assert "10 of 40   epoch 2   on cpu" in text
    assert "loss" in text
    assert "0:00:15 left" in text
    console.file.close()


def test_before_the_first_step_the_trainers_last_line_is_shown(run: Run) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115

    console.print(live_view.panel(View(run, last_line="caching latents.")))

    assert "caching latents." in console.export_text()
    console.file.close()


def test_the_whole_log_is_printed_without_redraws(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.log.write_bytes(b"loading\nsteps: 1%\rsteps: 2%\rsteps: 3%\nsaved\n")

    live_view.show(run, lambda: False, whole_log=True)

    assert capsys.readouterr().out == "loading\nsteps: 3%\nsaved\n"


def test_a_training_that_is_faster_than_the_lines_still_has_its_last_step_printed(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_view, "_POLL_SECONDS", 0.0)
    polls = iter(range(5))

    def running() -> bool:
        number = next(polls)
        with run.steps_file.open("a") as file:
            file.write(step_line(36 + number))
        return number < 4

    live_view.show(run, running)

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split(",")[0] for line in lines] == ["step 36/40", "step 40/40"]


def test_a_step_is_printed_once_however_long_the_next_one_takes(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_view, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(live_view, "_PLAIN_LINE_SECONDS", 0.0)
    steps(run, step_line(1))
    running = iter([True, True, True, False])

    live_view.show(run, lambda: next(running))

    assert capsys.readouterr().err.count("step 1/40") == 1


def test_the_rate_that_an_optimizer_found_is_shown_in_place_of_the_set_one(run: Run) -> None:
    (step,) = steps(run, step_line(1))
    step = msgspec.structs.replace(step, rates={"unet": 1.0, "d*lr/unet": 3e-5})

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(live_view.panel(View(run, run.begun(), [step])))

    text = console.export_text()
    assert "rate 3.00e-05" in text
    assert "1.00e+00" not in text
    console.file.close()
