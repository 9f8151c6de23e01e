"""How a running training goes: a live view on a terminal, plain lines elsewhere.

Everything shown is read from the run's files, so looking on costs the trainer nothing and
several can look on at once.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kohya_mps.core.report import say
from kohya_mps.core.text import format_size

from .runs import Begun, Run, Step, durations

if TYPE_CHECKING:
    from rich.console import RenderableType

_LOOK_EVERY = 0.5
_PLAIN_EVERY = 10.0
# As many steps as the pace is taken from: enough to be steady, few enough to follow a change.
_RECENT = 50
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60


class Tail:
    """What was added to a file since the last look, in whole lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._rest = b""

    def lines(self) -> list[bytes]:
        """The new lines; none while the file is not there."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return whole


class View(msgspec.Struct):
    """What is known of a run at one moment."""

    run: Run
    begun: Begun | None = None
    steps: list[Step] = []
    said: str = "starting"

    def loss_curve(self) -> str:
        """The average loss so far in one line of text, lowest to highest."""
        averages = [step.average for step in self.steps]
        if len(averages) < 2:
            return ""
        picked = [averages[i * (len(averages) - 1) // (_CURVE_WIDTH - 1)] for i in range(_CURVE_WIDTH)]
        low, high = min(averages), max(averages)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BARS[round((value - low) * scale)] for value in picked)

    def durations(self) -> list[float]:
        """Seconds that the steps took which were timed, pauses left out."""
        return list(durations(self.steps, self.run.record().resumed).values())

    def left(self) -> float | None:
        """Seconds until the last step: at the present pace, with samples and saves as often as so far."""
        spans = self.durations()
        if self.begun is None or not spans:
            return None
        besides = statistics.fmean(spans) - statistics.median(spans)
        return (self.begun.total - self.steps[-1].step) * max(0.0, pace(self.steps) + besides)


def pace(steps: list[Step]) -> float:
    """Seconds per step lately.

    The median: a step that also saved or drew samples is no measure, and neither is the
    pause before a resumed run.
    """
    recent = steps[-_RECENT - 1 :]
    spans = [after.time - before.time for before, after in itertools.pairwise(recent)]
    return statistics.median(spans) if spans else 0.0


def follow(
    run: Run, running: Callable[[], bool], *, whole_log: bool = False, on_ctrl_c: str = "stops looking on"
) -> None:
    """Show a run until it ends.

    Args:
        run: the run; nothing of it needs to be there yet.
        running: whether its trainer still runs.
        on_ctrl_c: what Ctrl-C does, as the live view says it.
        whole_log: pass on everything that the trainer prints instead.
    """
    if whole_log:
        _pass_on(run, running)
    elif sys.stderr.isatty():
        _live(run, running, on_ctrl_c)
    else:
        _plain(run, running)


def _views(run: Run, running: Callable[[], bool]) -> Iterator[View]:
    """The view at every look; the last one is of the ended run."""
    view = View(run, steps=[])
    steps, log = Tail(run.steps_file), Tail(run.log)
    while True:
        goes_on = running()
        view.begun = view.begun or run.begun()
        view.steps += [msgspec.json.decode(line, type=Step) for line in steps.lines()]
        for line in log.lines():
            text = line.rpartition(b"\r")[2].decode(errors="replace").strip()
            view.said = text or view.said
        yield view
        if not goes_on:
            return
        time.sleep(_LOOK_EVERY)


def _live(run: Run, running: Callable[[], bool], on_ctrl_c: str) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False) as live:
        for view in _views(run, running):
            live.update(panel(view, on_ctrl_c), refresh=True)


def panel(view: View, on_ctrl_c: str = "") -> RenderableType:
    """The live view."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", width=8)
    grid.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    if view.begun is None or not view.steps:
        where = f"on {view.begun.device}" if view.begun else "loading the model and the pictures"
        grid.add_row("phase", Text(where))
        grid.add_row("trainer", Text(view.said))
    else:
        last, total = view.steps[-1], view.begun.total
        grid.add_row("steps", ProgressBar(total=total, completed=last.step, width=None))
        grid.add_row("", Text(f"{last.step} of {total}   epoch {last.epoch}   on {view.begun.device}"))
        grid.add_row("loss", Text(f"{last.loss:.4f}   average {last.average:.4f}   rate {_rates(last)}"))
        grid.add_row("", Text(view.loss_curve(), "cyan"))
        grid.add_row("time", Text(_times(view)))
        grid.add_row("memory", Text(format_size(last.memory)))
    title = Text(f"{view.run.record().name}  {view.run.path}", overflow="ellipsis")
    hint = f"Ctrl-C {on_ctrl_c}" if on_ctrl_c else None
    return Panel(grid, title=title, title_align="left", subtitle=hint, subtitle_align="left")


def _times(view: View) -> str:
    left = view.left()
    elapsed = sum(view.durations())
    remaining = f"   {duration(left)} left" if left is not None else ""
    return f"{pace(view.steps):.2f} s per step   {duration(elapsed)} so far{remaining}"


def _plain(run: Run, running: Callable[[], bool]) -> None:
    """A line when something began, then one every few seconds in which a step was made."""
    told_begin, told_step, told_at = False, 0, 0.0
    for view in _views(run, running):
        if view.begun and not told_begin:
            say(f"training {view.begun.total} steps on {view.begun.device}")
            told_begin = True
        last = view.steps[-1] if view.steps else None
        finished = bool(last and view.begun and last.step >= view.begun.total)
        due = time.monotonic() - told_at >= _PLAIN_EVERY or finished
        if last and view.begun and last.step > told_step and due:
            say(plain_line(view, last, view.begun))
            told_step, told_at = last.step, time.monotonic()


def plain_line(view: View, last: Step, begun: Begun) -> str:
    """One line about the latest step."""
    return (
        f"step {last.step}/{begun.total}, epoch {last.epoch}, loss {last.loss:.4f}, average {last.average:.4f}, "
        f"{_times(view)}, {format_size(last.memory)}"
    )


def _pass_on(run: Run, running: Callable[[], bool]) -> None:
    log = Tail(run.log)
    recent: deque[bytes] = deque(log.lines(), maxlen=200)
    while True:
        goes_on = running()
        recent += log.lines()
        for line in recent:
            print(line.rpartition(b"\r")[2].decode(errors="replace"), flush=True)
        recent.clear()
        if not goes_on:
            return
        time.sleep(_LOOK_EVERY)


def _rates(step: Step) -> str:
    # Optimizers that find their own rate (Prodigy) say it as d*lr.
    own = {name: rate for name, rate in step.rates.items() if name.startswith("d*lr")}
    values = sorted(set((own or step.rates).values()))
    return ", ".join(f"{value:.2e}" for value in values)


def duration(seconds: float) -> str:
    """A time as it is shown: hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))
