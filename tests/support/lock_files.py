"""A ``.in`` file whose packages come from ``../wheels``, and what the check says of all locks."""

from __future__ import annotations

from pathlib import Path

from devtools.locks import check
from kohya_mps.core.report import Status


def write_in_file(constraints: Path, *lines: str, name: str = "train") -> Path:
    """Write ``NAME.in``: its packages come from the folder ``wheels`` next to the constraints."""
    head = "# exclude-newer: 2026-02-20\n--no-index\n--find-links ../wheels\n"
    path = constraints / f"{name}.in"
    path.write_text(head + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def failures() -> list[str]:
    """What ``nox -s lock_check`` finds wrong."""
    return [row.detail for row in check.check_all().checks if row.status is Status.FAIL]
