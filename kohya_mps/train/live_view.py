"""The progress of a running training: a live view on a terminal, plain lines elsewhere.

Everything is read from the run's files. So the view costs the trainer nothing, and several
terminals can show the same run.
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

_POLL_SECONDS = 0.5
_PLAIN_LINE_SECONDS = 10.0
# The number of steps that the pace is computed from: enough to be steady, few enough to follow a change.
_RECENT_STEPS = 50
# The number of lines before the present ones that `invoke logs --whole` prints.
_RECENT_LINES = 200
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 60


class Tail:
    """The lines that were added to a file since the last call; a line without its end has to wait."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._rest = b""

    def lines(self) -> list[bytes]:
        """The new complete lines; none while the file does not exist."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
        except FileNotFoundError:
            return []
        self._read += len(new)
        *complete, self._rest = (self._rest + new).split(b"\n")
        return complete


class View(msgspec.Struct):
    """The state of a run at one moment; ``last_line`` is the trainer's last line of output."""

    run: Run
    begun: Begun | None = None
    steps: list[Step] = []
    last_line: str = "starting"

    def loss_curve(self) -> str:
        """The average loss so far as a line of bars; empty before the second step."""
        averages = [step.average for step in self.steps]
        if len(averages) < 2:
            return ""
        picked = [averages[i * (len(averages) - 1) // (_CURVE_WIDTH - 1)] for i in range(_CURVE_WIDTH)]
        low, high = min(averages), max(averages)
        scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
        return "".join(_BARS[round((value - low) * scale)] for value in picked)

    def durations(self) -> list[float]:
        """The seconds that the steps took, without pauses."""
        return list(durations(self.steps, self.run.record().resumed).values())

    def left(self) -> float | None:
        """The seconds until the last step, at the present pace; None before there is a pace.

        Samples and saves are counted as often as there were so far: they are the difference
        between the mean and the median of the steps.
        """
        spans = self.durations()
        if self.begun is None or not spans:
            return None
        samples_and_saves = statistics.fmean(spans) - statistics.median(spans)
        return (self.begun.total - self.steps[-1].step) * max(0.0, pace(self.steps) + samples_and_saves)


def pace(steps: list[Step]) -> float:
    """The seconds per step of the recent steps; 0 before the second step.

    It is their median, so steps that also saved or drew samples, and the pause before a resumed
    run, do not change it.
    """
    recent = steps[-_RECENT_STEPS - 1 :]
    spans = [after.time - before.time for before, after in itertools.pairwise(recent)]
    return statistics.median(spans) if spans else 0.0


def show(
    run: Run, running: Callable[[], bool], *, whole_log: bool = False, on_ctrl_c: str = "closes this view"
) -> None:
    """Show the progress of a run until it ends.

    Args:
        run: the run; the trainer need not have written anything yet.
        running: whether its trainer still runs.
        on_ctrl_c: what Ctrl-C does, for the lower edge of the live view.
        whole_log: print everything that the trainer prints instead.
    """
    if whole_log:
        _print_log(run, running)
    elif sys.stderr.isatty():
        _live(run, running, on_ctrl_c)
    else:
        _plain(run, running)


def _views(run: Run, running: Callable[[], bool]) -> Iterator[View]:
    """The view, updated at every poll; the last one is of the ended run."""
    view = View(run, steps=[])
    steps, log = Tail(run.steps_file), Tail(run.log)
    while True:
        still_running = running()
        view.begun = view.begun or run.begun()
        view.steps += [msgspec.json.decode(line, type=Step) for line in steps.lines()]
        for line in log.lines():
            text = line.rpartition(b"\r")[2].decode(errors="replace").strip()
            view.last_line = text or view.last_line
        yield view
        if not still_running:
            return
        time.sleep(_POLL_SECONDS)


def _live(run: Run, running: Callable[[], bool], on_ctrl_c: str) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False) as live:
        for view in _views(run, running):
            live.update(panel(view, on_ctrl_c), refresh=True)


def panel(view: View, on_ctrl_c: str = "") -> RenderableType:
    """The live view as something that rich can print."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", width=8)
    grid.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    if view.begun is None or not view.steps:
        phase = f"on {view.begun.device}" if view.begun else "loading the model and the pictures"
        grid.add_row("phase", Text(phase))
        grid.add_row("trainer", Text(view.last_line))
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
    """Print a line when the training begins, then one every few seconds if there are new steps."""
    announced, printed_step, printed_at = False, 0, 0.0
    for view in _views(run, running):
        if view.begun and not announced:
            say(f"training {view.begun.total} steps on {view.begun.device}")
            announced = True
        last = view.steps[-1] if view.steps else None
        finished = bool(last and view.begun and last.step >= view.begun.total)
        due = time.monotonic() - printed_at >= _PLAIN_LINE_SECONDS or finished
        if last and view.begun and last.step > printed_step and due:
            say(plain_line(view, last, view.begun))
            printed_step, printed_at = last.step, time.monotonic()


def plain_line(view: View, last: Step, begun: Begun) -> str:
    """One line about the latest step."""
    return (
        f"step {last.step}/{begun.total}, epoch {last.epoch}, loss {last.loss:.4f}, average {last.average:.4f}, "
        f"{_times(view)}, {format_size(last.memory)}"
    )


def _print_log(run: Run, running: Callable[[], bool]) -> None:
    log = Tail(run.log)
    recent: deque[bytes] = deque(log.lines(), maxlen=_RECENT_LINES)
    while True:
        still_running = running()
        recent += log.lines()
        for line in recent:
            print(line.rpartition(b"\r")[2].decode(errors="replace"), flush=True)
        recent.clear()
        if not still_running:
            return
        time.sleep(_POLL_SECONDS)


def _rates(step: Step) -> str:
    # Optimizers that find their own rate, such as Prodigy, log it as d*lr.
    own = {name: rate for name, rate in step.rates.items() if name.startswith("d*lr")}
    values = sorted(set((own or step.rates).values()))
    return ", ".join(f"{value:.2e}" for value in values)


def duration(seconds: float) -> str:
    """A time as hours, minutes and seconds, such as ``1:02:03``."""
    return str(datetime.timedelta(seconds=round(seconds)))
