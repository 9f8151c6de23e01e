"""A stand-in for the torchgen that every torch wheel has."""

from __future__ import annotations

from pathlib import Path

_GEN = """
from types import SimpleNamespace as Object

def parse_native_yaml(functions, tags):
    made = {}
    for line in open(functions):
        name, kernel, delegate = line.split()
        made[name] = Object(func=Object(name=name), kernel=kernel, structured_delegate=None)
        if delegate != "-":
            made[name].structured_delegate = delegate
    index = Object(has_kernel=lambda function: function.kernel == "yes")
    return Object(backend_indices={"MPS": index}, native_functions=list(made.values()))
"""


def unpacked(root: Path, *lines: str) -> Path:
    """A wheel whose torchgen reads a list of NAME, whether it has a kernel, and the variant that has it."""
    (root / "torchgen").mkdir()
    (root / "torchgen" / "__init__.py").touch()
    (root / "torchgen" / "gen.py").write_text(_GEN)
    (root / "torchgen" / "model.py").write_text("class DispatchKey:\n    MPS = 'MPS'\n")
    folder = root / "torchgen" / "packaged" / "ATen" / "native"
    folder.mkdir(parents=True)
    (folder / "native_functions.yaml").write_text("\n".join(lines))
    return root
