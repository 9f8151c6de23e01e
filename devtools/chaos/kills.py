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
from collections.abc import Callable, Iterable

import msgspec

from .testbed import Attempts, Ran, Row, Testbed, expect

_STEP = re.compile(r"\[\d+/\d+\] ")


class Moment(msgspec.Struct, frozen=True):
    """A moment of a run: seconds after it announced a step; step 0 is its start."""

    step: int
    seconds: float


class Timeline(msgspec.Struct, frozen=True):
    """When an undisturbed run announced its steps and ended, in seconds after its start."""

    steps: tuple[float, ...]
    end: float

    def moments(self, count: int) -> list[Moment]:
        """Moments to kill at: half spread evenly over the time, half evenly over the steps.

        Most of the time goes to importing torch; most of what can break happens in the rest.
        """
        shuffled = random.Random(count)  # noqa: S311 -- the same kills for the same count
        bounds = [0.0, *self.steps, self.end]
        by_time, by_step = (count + 1) // 2, count // 2
        found = []
        for n in range(by_time):
            at = self.end * (n + shuffled.random()) / by_time
            step = bisect.bisect_right(bounds, at) - 1
            found.append(Moment(step, at - bounds[step]))
        for n in range(by_step):
            where = (len(bounds) - 1) * (n + shuffled.random()) / by_step
            step = int(where)
            found.append(Moment(step, (where - step) * (bounds[step + 1] - bounds[step])))
        return sorted(found, key=lambda moment: (moment.step, moment.seconds))


def reference(testbed: Testbed) -> Timeline:
    """Measure a run from its start to its end."""
    began = time.monotonic()
    steps, lines = [], []
    with testbed.start(*testbed.setup_command) as process:
        assert process.stderr and process.stdout
        for line in process.stderr:
            lines.append(line)
            if _STEP.match(line):
                steps.append(time.monotonic() - began)
        out = process.stdout.read()
        code = process.wait()
    ran = Ran(code, out, "".join(lines), time.monotonic() - began)
    ran.assert_code(0, "an undisturbed run")
    return Timeline(tuple(steps), ran.seconds)


def kill(process: subprocess.Popen[str], moment: Moment) -> bool:
    """Kill a run at a moment: its first process alone, as a system without memory does.

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


def kills_fresh(testbed: Testbed, count: int) -> Row:
    """Kill the first set-up of a home."""

    def assert_nothing_half_built() -> None:
        if os.path.lexists(testbed.home.venv):
            testbed.active_is_whole()

    attempts = Attempts("kill, fresh install", testbed)
    killed = _kill_each(attempts, testbed, count, testbed.remove, assert_nothing_half_built)
    return attempts.done(
        f"{killed}, half of the kills evenly over its time, half evenly over its steps; then no environment or a "
        "whole one, one rerun without the training step, status, processes and files left behind"
    )


def kills_rebuild(testbed: Testbed, count: int) -> Row:
    """Kill the set-up that replaces an environment."""

    def need_a_rebuild() -> None:
        testbed.install()
        testbed.new_lock()

    attempts = Attempts("kill, rebuild", testbed)
    killed = _kill_each(attempts, testbed, count, need_a_rebuild, testbed.active_passes_smoke)
    with attempts.attempt("a whole set-up after all kills"):
        testbed.new_lock()
        testbed.invoke(*testbed.setup_command).assert_code(0)
        left = list(testbed.home.verification.glob("models/*.unfinished"))
        expect(not left, f"unfinished models are left: {left}")
        testbed.assert_healthy()
    return attempts.done(
        f"{killed}, spread as for a fresh install; then the smoke check in the environment before it (every "
        "time), one rerun, status, processes and files left behind; at the end one whole set-up"
    )


def _kill_each(
    attempts: Attempts,
    testbed: Testbed,
    count: int,
    prepare: Callable[[], None],
    assert_survived: Callable[[], None],
) -> str:
    """Kill a set-up at moments that are spread over its whole run.

    Args:
        attempts: counts the kills.
        testbed: where it runs.
        count: how many kills.
        prepare: comes before each run, and before the one that is measured.
        assert_survived: comes after each kill, before the rerun.

    Returns:
        What was killed, for the report.
    """
    prepare()
    timeline = reference(testbed)
    ended_first = 0
    for moment in timeline.moments(count):
        with attempts.attempt(f"killed {moment.seconds:.2f} s into step {moment.step}"):
            prepare()
            ended_first += not kill(testbed.start(*testbed.setup_command), moment)
            assert_survived()
            testbed.assert_recovers()
    command = " ".join(("invoke", *testbed.setup_command)) + ("" if testbed.real else " (no real kohya_ss)")
    ended = f" ({ended_first} ended before they were killed)" if ended_first else ""
    return f"{command} of {timeline.end:.0f} s{ended}"


def pairs(testbed: Testbed, count: int) -> Row:
    """Start two runs together on one home."""
    attempts = Attempts("two runs together", testbed)
    both = 0
    for n in range(count):
        with attempts.attempt(f"pair {n + 1}"):
            if n == 0:
                testbed.remove()
            else:
                testbed.install()
                active = testbed.active()
                active.accelerate_config.unlink()  # so that there is something to do
            two = [testbed.start(*testbed.quick_setup) for _ in range(2)]
            errors = [process.communicate()[1] for process in two]
            codes = [process.returncode for process in two]
            both += codes == [0, 0]
            expect(sorted(codes) in ([0, 0], [0, 3]), f"they ended with {codes}: {errors}")
            if 3 in codes:
                busy = codes.index(3)
                expect(
                    f"process {two[1 - busy].pid}" in errors[busy], f"the other is not named: {errors[busy]}"
                )
            testbed.assert_healthy()
    return attempts.done(
        f"exit codes 0 and 3, the other's process id named ({both} times 0 and 0, one after the other); then status"
    )
