"""Write down what reaches the device, with the line that caused it."""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path
from types import CodeType

import torch

from ..operators import Served
from ..record import Finding, Kind, Operator

# Frames of torch and of the simulation are never the cause.
_NOT_THE_CAUSE = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen ", "<string>")
UNKNOWN = "(called from C++)"


class Recorder:
    """Collects operators and findings while a training runs; safe to use from the autograd thread."""

    def __init__(self) -> None:
        self._operators: dict[str, tuple[Served, str, str]] = {}
        self._counts: dict[str, int] = {}
        self._findings: dict[tuple[Kind, str, str], tuple[int, str]] = {}
        # The forward line behind each node of the autograd graph, by its sequence number.
        self._forward: dict[int, tuple[CodeType, int]] = {}
        self._last_node = -1
        self._lock = threading.Lock()

    def operator(self, name: str, served: Served, by: str = "") -> None:
        """Note that an overload reached the device."""
        self._note_forward()
        if name in self._counts:
            self._counts[name] += 1
            return
        with self._lock:
            self._counts[name] = 1
            self._operators[name] = (served, self.where(), by)

    def finding(self, kind: Kind, what: str, raises: str = "") -> None:
        """Note something that is different on MPS, with the present line."""
        where = self.where()
        with self._lock:
            count, before = self._findings.get((kind, what, where), (0, ""))
            self._findings[kind, what, where] = (count + 1, raises or before)

    def where(self) -> str:
        """File and line of the innermost caller that is neither torch nor the simulation.

        Gradients are computed by a thread of torch's own, whose stack has no such caller. There
        it is the line of the forward pass that made the node of the graph.
        """
        line = _caller()
        node = torch._C._current_autograd_node()
        if line is None and node is not None:
            line = self._forward.get(node._sequence_nr())
            return f"{_name(line)} (its gradient)" if line else f"{node.name()} {UNKNOWN}"
        return _name(line) if line else UNKNOWN

    def operators(self) -> tuple[Operator, ...]:
        """What reached the device, in the order of the names."""
        return tuple(
            Operator(name, served, self._counts[name], where, by)
            for name, (served, where, by) in sorted(self._operators.items())
        )

    def findings(self) -> tuple[Finding, ...]:
        """What is different on MPS, in the order in which it first happened."""
        return tuple(
            Finding(kind, what, where, count, raises)
            for (kind, what, where), (count, raises) in self._findings.items()
        )

    def _note_forward(self) -> None:
        # The node of the operation under way was numbered just before (as torch.fx's
        # tracer relies on, torch/fx/proxy.py); the parts of an operation make none.
        node = torch.autograd._get_sequence_nr() - 1
        if node != self._last_node:
            self._last_node = node
            if (line := _caller()) is not None:
                self._forward[node] = line


def raised_at(error: BaseException) -> str:
    """File and line of the innermost caller that is neither torch nor the simulation."""
    found = UNKNOWN
    trace = error.__traceback__
    while trace is not None:
        if _may_be_the_cause(trace.tb_frame.f_code):
            found = _name((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _caller() -> tuple[CodeType, int] | None:
    frame = sys._getframe(2)
    while frame is not None:
        if _may_be_the_cause(frame.f_code):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


@functools.cache
def _may_be_the_cause(code: CodeType) -> bool:
    # The bootstrap of a thread calls nobody's code.
    return not code.co_filename.startswith(_NOT_THE_CAUSE) and code.co_name != "_bootstrap"


def _name(line: tuple[CodeType, int]) -> str:
    path = line[0].co_filename
    for root in sorted(sys.path, key=len, reverse=True):
        if root and path.startswith(root.rstrip("/") + "/"):
            path = path[len(root.rstrip("/")) + 1 :]
            break
    return f"{path}:{line[1]}"
