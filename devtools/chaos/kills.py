"""Kills at moments spread over a whole run, and two runs at once."""

from __future__ import annotations

import bisect
import contextlib
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterable

import msgspec

from .testbed import Attempts, Ran, Row, Testbed, expect

_STEP = re.compile(r"\[\d+/\d+\] ")


class Moment(msgspec.Struct, frozen=True):
    """A moment of a run: seconds after it announced a step; step 0 is its start."""

    step: int
    seconds: float


class Timeline(msgspec.Struct, frozen=True):
    """When a run that was left alone announced its steps, and its end; seconds after its start."""

    steps: tuple[float, ...]
    end: float

    def moments(self, count: int) -> list[Moment]:
        """Moments to kill at: half spread evenly over the time, half evenly over the steps.

        Most of the time goes to importing torch; most of what can break happens in the rest.
        """
        shaken = random.Random(count)  # noqa: S311 -- the same kills for the same count
        bounds = [0.0, *self.steps, self.end]
        by_time, by_step = (count + 1) // 2, count // 2
        found = []
        for n in range(by_time):
            at = self.end * (n + shaken.random()) / by_time
            step = bisect.bisect_right(bounds, at) - 1
            found.append(Moment(step, at - bounds[step]))
        for n in range(by_step):
            where = (len(bounds) - 1) * (n + shaken.random()) / by_step
            step = int(where)
            found.append(Moment(step, (where - step) * (bounds[step + 1] - bounds[step])))
        return sorted(found, key=lambda moment: (moment.step, moment.seconds))


def reference(place: Testbed) -> Timeline:
    """Measure a run from its start to its end."""
    began = time.monotonic()
    steps, lines = [], []
    with place.start(*place.whole) as process:
        assert process.stderr and process.stdout
        for line in process.stderr:
            lines.append(line)
            if _STEP.match(line):
                steps.append(time.monotonic() - began)
        out = process.stdout.read()
        code = process.wait()
    expect(code == 0, f"a run that was left alone failed: {Ran(code, out, ''.join(lines), 0).said}")
    return Timeline(tuple(steps), time.monotonic() - began)


def kill(process: subprocess.Popen[str], moment: Moment) -> bool:
    """Kill a run at a moment: the one process alone, as a system short of memory does.

    Returns:
        Whether it was still running.
    """
    assert process.stderr and process.stdout
    due = threading.Event()

    def follow(lines: Iterable[str]) -> None:
        seen = 0
        for line in lines:
            seen += bool(_STEP.match(line))
            if seen >= moment.step:
                due.set()
        due.set()

    readers = [
        threading.Thread(target=follow, args=(process.stderr,)),
        threading.Thread(target=process.stdout.read),
    ]
    for reader in readers:
        reader.start()
    if moment.step:
        due.wait()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment.seconds)
    alive = process.poll() is None
    process.kill()
    process.wait()
    for reader in readers:
        reader.join()
    process.stdout.close()
    process.stderr.close()
    return alive


def kills_fresh(place: Testbed, count: int) -> Row:
    """Kill the first set-up of a home."""
    place.remove()
    line = reference(place)
    row = Attempts("kill, fresh install")
    ended_first = 0
    for moment in line.moments(count):
        with row.attempt(f"killed {moment.seconds:.2f} s into step {moment.step}", place):
            place.remove()
            ended_first += not kill(place.start(*place.whole), moment)
            if os.path.lexists(place.home.venv):
                place.active_is_whole()
            place.assert_recovers()
    return row.done(
        f"{_what_ran(place)} of {line.end:.0f} s, half of the kills evenly over its time, half evenly over its "
        f"steps{_ended(ended_first)}; then no environment or a whole one, one rerun without the training step, "
        "status, processes and files left behind"
    )


def kills_rebuild(place: Testbed, count: int) -> Row:
    """Kill the set-up that replaces an environment."""
    place.install()
    place.new_lock()
    line = reference(place)
    row = Attempts("kill, rebuild")
    ended_first = 0
    for moment in line.moments(count):
        with row.attempt(f"killed {moment.seconds:.2f} s into step {moment.step}", place):
            place.install()
            place.new_lock()
            ended_first += not kill(place.start(*place.whole), moment)
            place.active_passes_smoke()
            place.assert_recovers()
    with row.attempt("a whole set-up after all kills", place):
        place.new_lock()
        ran = place.invoke(*place.whole)
        expect(ran.code == 0, f"ended with {ran.code}: {ran.said}")
        left = list(place.home.verification.glob("models/*.unfinished"))
        expect(not left, f"unfinished models are left: {left}")
        place.assert_healthy()
    return row.done(
        f"{_what_ran(place)} of {line.end:.0f} s, spread as above{_ended(ended_first)}; then the smoke check in "
        "the environment before it (every time), one rerun, status, processes and files left behind; at the end "
        "one whole set-up"
    )


def _what_ran(place: Testbed) -> str:
    return "invoke setup" if place.real else "invoke setup --no-train-step (no real kohya_ss)"


def _ended(count: int) -> str:
    return f" ({count} ended before they were killed)" if count else ""


def pairs(place: Testbed, count: int) -> Row:
    """Two runs that are started together on one home."""
    row = Attempts("two runs together")
    both = 0
    for n in range(count):
        with row.attempt(f"pair {n + 1}", place):
            if n == 0:
                place.remove()
            else:
                place.install()
                active = place.active()
                active.accelerate_config.unlink()  # so that there is something to do
            two = [place.start("setup", "--no-train-step") for _ in range(2)]
            said = [process.communicate()[1] for process in two]
            codes = [process.returncode for process in two]
            both += codes == [0, 0]
            expect(sorted(codes) in ([0, 0], [0, 3]), f"they ended with {codes}: {said}")
            if 3 in codes:
                busy = codes.index(3)
                expect(f"process {two[1 - busy].pid}" in said[busy], f"the other is not named: {said[busy]}")
            place.assert_healthy()
    return row.done(
        f"exit codes 0 and 3, the other's process id named ({both} times 0 and 0, one after the other); then status"
    )
