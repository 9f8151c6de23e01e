"""Turn this process into one that has an MPS device; there is no way back."""

from __future__ import annotations

import torch

from .. import operators
from . import attention, cpp_registration, torch_functions
from .device import Simulator
from .recorder import Recorder

# A small Mac: macOS 15.1, and the share of 16 GB that Metal recommends.
MACOS = (15, 1)
MEMORY = 11 << 30


def simulate(recorder: Recorder, *, fallback: bool = False) -> Simulator:
    """Simulate an MPS device from now on.

    Args:
        recorder: notes what reaches the device.
        fallback: behave as with ``PYTORCH_ENABLE_MPS_FALLBACK=1``.

    Raises:
        LookupError: there is no operator data for this torch.
        GuardUnavailable: this torch has an unknown layout.
    """
    simulator = Simulator(operators.load(torch.__version__), recorder, fallback=fallback)
    cpp_registration.install()
    torch_functions.install(recorder, macos=MACOS, memory=MEMORY)
    attention.install(simulator, simulator.library)
    simulator.install()
    return simulator
