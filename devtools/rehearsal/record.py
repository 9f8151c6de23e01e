"""What a rehearsal wrote down. Standard library alone: both interpreters import it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from .operators import Served


class Kind(StrEnum):
    """What a finding is about."""

    FLOAT64 = "float64"
    CUDA = "torch.cuda"
    MIXED = "mixed devices"
    REFUSED = "refused by the kernel"
    MISSING = "missing operator"
    FALLBACK = "CPU fallback"


@dataclass(frozen=True)
class Operator:
    """One overload that reached the device: how it is served, how often, and its first caller.

    ``by`` names the MPS kernel behind a composite operator that picks its backend by device.
    """

    name: str
    served: Served
    count: int
    where: str
    by: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that behaves differently on MPS than on a CPU.

    Attributes:
        kind: what it is about.
        what: the operator or function, with what is special about the call.
        where: file and line that caused it; for a gradient, the line of the forward pass.
        count: how often that happened there.
        raises: the error that a Mac raises; empty when it is only slower or only noted.
    """

    kind: Kind
    what: str
    where: str
    count: int
    raises: str = ""


@dataclass(frozen=True)
class Record:
    """What happened in one training, on the simulated device or on the CPU (``device``).

    ``error`` is the error that ended it, and ``error_at`` the file and line that raised it.
    """

    device: str
    torch: str
    losses: tuple[float, ...]
    seconds: float
    error: str = ""
    error_at: str = ""
    operators: tuple[Operator, ...] = ()
    findings: tuple[Finding, ...] = ()

    def count(self, served: Served) -> int:
        """How many distinct overloads were served in this way."""
        return sum(operator.served is served for operator in self.operators)


def write(path: Path, record: Record) -> None:
    """Write a record as JSON; the file appears when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
    unfinished.replace(path)


def read(path: Path) -> Record:
    """Read a record back."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["losses"] = tuple(data["losses"])
    data["operators"] = tuple(
        Operator(**{**row, "served": Served(row["served"])}) for row in data["operators"]
    )
    data["findings"] = tuple(Finding(**{**row, "kind": Kind(row["kind"])}) for row in data["findings"])
    return Record(**data)
