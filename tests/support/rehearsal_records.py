"""Records of a small training: on the CPU, as good on the simulated device, and failed there."""

from __future__ import annotations

from dataclasses import replace

from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Operator, Record

CPU = Record("cpu", "2.5.1", (1.0, 0.5), 1.0)
GOOD = Record(
    "mps",
    "2.5.1",
    (1.0000001, 0.5),
    2.0,
    operators=(
        Operator("add.Tensor", Served.KERNEL, 7, "train.py:1"),
        Operator("convolution", Served.COMPOSITE, 2, "train.py:2", "_mps_convolution"),
    ),
)
FAILED = replace(GOOD, losses=(), error="RuntimeError: no", error_at="train.py:3")
