"""Run rehearsals under the trainer's interpreter.

usage: python devtools/rehearsal/simulation REQUESTS JOBS

REQUESTS is a JSON file of requests. The trainer's libraries are imported once. Each request then
runs in a copy of this process, JOBS at a time, so that all of them start from the same state.
"""

import contextlib
import faulthandler
import os
import sys
import traceback
from pathlib import Path

# The trainer's own modules come first, and this folder's are not found at all.
sys.path[0:1] = []
sys.path.append(str(Path(__file__).resolve().parents[3]))

from devtools.rehearsal import request  # noqa: E402
from devtools.rehearsal.request import Request  # noqa: E402


def import_everything(script: str) -> None:
    """Import what takes most of the time of a short training; it starts no thread."""
    import accelerate  # noqa: F401
    import torch

    import devtools.rehearsal.simulation.train  # noqa: F401

    # The autograd engine's threads would not survive a fork.
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(script).parent))
    with contextlib.suppress(ImportError):  # the probe that trains without kohya's code
        import library.train_util  # noqa: F401
    sys.path.pop(0)


def start(one: Request) -> int:
    """Run a request in a copy of this process, and return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        faulthandler.enable()
        if one.log:
            log = os.open(one.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
        from devtools.rehearsal.simulation.train import train_and_record

        train_and_record(one)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    requests, jobs = request.read(Path(sys.argv[1])), int(sys.argv[2])
    import_everything(requests[0].script)
    running: dict[int, Request] = {}
    for number, one in enumerate(requests, 1):
        if len(running) >= jobs:
            running.pop(os.wait()[0])
        running[start(one)] = one
        print(f"REHEARSAL {number}/{len(requests)} {one.name} on {one.device}", file=sys.stderr, flush=True)
    while running:
        running.pop(os.wait()[0])


if __name__ == "__main__":
    main()
