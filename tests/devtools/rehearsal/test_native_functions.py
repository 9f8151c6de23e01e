from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from devtools.rehearsal import native_functions, wheel
from tests.support.torchgen import unpacked


def test_a_structured_operator_has_the_kernel_of_its_out_variant(tmp_path: Path) -> None:
    root = unpacked(tmp_path, "mm no mm.out", "mm.out yes -", "eig no -", "relu yes -")
    command = [sys.executable, str(native_functions.__file__), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["mm", "mm.out", "relu"]
    assert wheel.kernels(root) == ["mm", "mm.out", "relu"]
