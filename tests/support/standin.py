"""A lock with a stand-in of accelerate: enough for set-up's own steps, without gigabytes.

It replaces accelerate's command line and configuration helper only. The real ones are
tested in the real environment.
"""

from __future__ import annotations

from pathlib import Path

from kohya_mps.install.setup import SetupOptions
from tests.support.wheelhouse import pin, wheel

#: The stand-in cannot be verified: it has no torch.
UNVERIFIED = SetupOptions(smoke=False, train_step=False)

_UTILS = b"""\
import json, pathlib

def write_basic_config(mixed_precision, save_location):
    values = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": mixed_precision, "use_cpu": True}
    pathlib.Path(save_location).write_text(json.dumps(values))
"""
_ARGS = b"""\
import json, pathlib

class Config(dict):
    to_dict = lambda self: dict(self)

def load_config_from_file(path):
    return Config(json.loads(pathlib.Path(path).read_text()))
"""
# accelerate launch --config_file FILE SCRIPT ARGUMENTS
_LAUNCH = b"""\
import os, runpy, sys

assert sys.argv[1:3] == ["launch", "--config_file"], sys.argv
assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
sys.argv = sys.argv[4:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_lock(lock: Path, house: Path, version: str = "1.0") -> None:
    """Wheels in ``house`` and their lock; another version makes another lock."""
    accelerate = {
        "accelerate/accelerator.py": b"",
        "accelerate/utils.py": _UTILS,
        "accelerate/commands/__init__.py": b"",
        "accelerate/commands/accelerate_cli.py": _LAUNCH,
        "accelerate/commands/config/__init__.py": b"",
        "accelerate/commands/config/config_args.py": _ARGS,
    }
    made = (
        wheel(house, "plain", version, files={"plain/core.py": b"VALUE = 1\n"}),
        wheel(house, "accelerate", "1.3.0", files=accelerate),
        # JSON is YAML.
        wheel(house, "pyyaml", "6.0", files={"yaml/__init__.py": b"from json import dumps as safe_dump\n"}),
    )
    lock.write_text("".join(pin(path) for path in made), encoding="utf-8")
