"""A small program in place of the trainer's interpreter: it writes a run's files as the trainer does."""

from __future__ import annotations

import json
import stat
import sys

from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import Settings
from kohya_mps.install import generations
from kohya_mps.train.runs import Run

_TRAINER = """#!{python}
import json, os, sys, time
from pathlib import Path
request = next(json.loads(word) for word in sys.argv if word.startswith("{{"))
words = sys.argv
output = Path(words[words.index("--output_dir") + 1])
name = words[words.index("--output_name") + 1]
steps, begun, ended, stop = (Path(request[n]) for n in ("steps", "begun", "ended", "stop"))
(steps.parent / "received.json").write_text(json.dumps([words, os.getcwd(), os.getsid(0) == os.getpid()]))
first = 1
if request["resume"]:
    first += json.loads((Path(request["resume"]) / "train_state.json").read_text())["current_step"]
begun.write_text(json.dumps({{"total": 6, "device": "{device}", "processes": 1, "pid": os.getpid()}}))
def save(step):
    state = output / f"{{name}}-step{{step:08d}}-state"
    state.mkdir()
    (state / "train_state.json").write_text(json.dumps({{"current_epoch": 1, "current_step": step}}))
    (state / "watched_0.pt").touch()
def end(how, step, error=""):
    ended.write_text(json.dumps({{"how": how, "step": step, "error": error}}))
for step in range(first, 7):
    if stop.exists():
        save(step - 1)
        end("stopped", step - 1)
        sys.exit(0)
    with steps.open("a") as file:
        file.write(json.dumps(dict(step=step, epoch=1, time=time.time(), loss=1 / step, average=1 / step,
                                   memory=1, rates={{"unet": 1e-4}})) + "\\n")
    if step == 3 and not request["resume"]:
        save(3)
    if step == 4 and not request["resume"]:
        {at_four}
    time.sleep(0.02)
(output / f"{{name}}.safetensors").write_bytes(b"lora")
end("finished", 6)
"""

# What it does at its fourth step.
GO_ON = "pass"
DIE = "os.kill(os.getpid(), 9)"
WAIT = "[time.sleep(0.05) for _ in range(400) if not stop.exists()]"


def stand_in(settings: Settings, at_four: str = GO_ON, *, device: str = "cpu") -> None:
    """Make the active environment's interpreter the stand-in; ``at_four`` is what it does at step 4."""
    write_interpreter(settings, _TRAINER.format(python=sys.executable, at_four=at_four, device=device))


def write_interpreter(settings: Settings, program: str) -> None:
    """Replace the active environment's interpreter by a program."""
    active = generations.active(Installation(settings.home))
    assert active is not None
    active.python.write_text(program)
    active.python.chmod(active.python.stat().st_mode | stat.S_IXUSR)


def received(run: Run) -> tuple[list[str], str, bool]:
    """The stand-in's arguments, its working directory, and whether it leads a session."""
    words, directory, leads_session = json.loads((run.path / "received.json").read_text())
    return words, directory, leads_session
