"""A stage for rehearsals whose interpreter is a stand-in: it makes what the probes make, and records."""

from __future__ import annotations

from pathlib import Path

from devtools.rehearsal.runner import Stage
from kohya_mps.core.settings import ROOT
from kohya_mps.install.generations import Generation
from tests.support.installs import stand_in_python

# A training whose arguments have "fails" ends with an error on the simulated device, "dies"
# leaves no record, "differs" has other losses there.
_PROGRAM = f"""
import sys
from pathlib import Path

sys.path.append({str(ROOT)!r})
script, arguments = sys.argv[1], sys.argv[2:]
if script.endswith("make_model.py"):
    (Path(arguments[0]) / "model").mkdir(parents=True)
elif script.endswith("pictures.py"):
    (Path(arguments[0]) / "2_shapes").mkdir(parents=True)
    (Path(arguments[0]) / "2_shapes" / "0.txt").write_text("a red circle")
elif script.endswith("simulation"):
    from devtools.rehearsal import record, request
    for each in request.read(Path(arguments[0])):
        output = Path(each.result).parent
        (output / "weights.safetensors").write_bytes(b"large")
        Path(each.log).write_text("what the trainer printed")
        simulated = each.device == "mps"
        if simulated and "dies" in each.arguments:
            continue
        error = "RuntimeError: no" if simulated and "fails" in each.arguments else ""
        losses = (1.1, 0.5) if simulated and "differs" in each.arguments else (1.0, 0.5)
        made = record.Record(each.device, "2.5.1", () if error else losses, 1.0, error, "train.py:3" if error else "")
        record.write(Path(each.result), made)
else:
    sys.exit("unknown: " + script)
"""


def make_stage(root: Path, program: str = _PROGRAM) -> Stage:
    """A stage with a stand-in for the trainer's interpreter, and empty scripts for the trainers."""
    generation = Generation(root / "generation")
    stand_in_python(generation, program)
    sd_scripts, work = root / "sd-scripts", root / "work"
    sd_scripts.mkdir()
    work.mkdir()
    return Stage(generation, sd_scripts, "no", work)
