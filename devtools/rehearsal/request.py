"""What a rehearsal does. Standard library alone: both interpreters import it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One training.

    Attributes:
        name: its name in reports and file names.
        device: ``mps`` for the simulated device, ``cpu`` for the comparison.
        script: the trainer, or the probe that trains without it.
        arguments: the arguments of the script.
        small: whether the script is one of sd-scripts and trains one of the small models.
        fallback: behave as with ``PYTORCH_ENABLE_MPS_FALLBACK=1``.
        result: where the record is written.
        log: the file for everything that the training prints; empty for this process's own output.
    """

    name: str
    device: str
    script: str
    arguments: tuple[str, ...]
    small: bool
    fallback: bool
    result: str
    log: str = ""


def write(path: Path, requests: list[Request]) -> None:
    """Write requests as JSON."""
    path.write_text(json.dumps([dataclasses.asdict(request) for request in requests]), encoding="utf-8")


def read(path: Path) -> list[Request]:
    """Read requests back."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Request(**{**row, "arguments": tuple(row["arguments"])}) for row in rows]
