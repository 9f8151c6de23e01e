"""The smoke checks that need the trainer's interpreter, in one process that imports torch once.

usage (through accelerate launch): smoke.py REQUEST RESULT

REQUEST is a JSON file with the expected values. RESULT is the JSON file to write: a list of
checks with the fields name, good, detail and fix.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Found = tuple[bool, str]


def interpreter(request: dict[str, Any]) -> Found:
    """Python is native to the machine, and has the version that the lock is for."""
    machine, version = platform.machine(), platform.python_version()
    detail = f"Python {version}, {machine}"
    if sys.platform == "darwin":
        translated = subprocess.run(
            ["sysctl", "-n", "sysctl.proc_translated"], capture_output=True, text=True, check=False
        )
        if machine != "arm64" or translated.stdout.strip() == "1":
            return False, f"{detail}, under Rosetta: not native to Apple Silicon"
    return version.startswith(request["python"] + "."), detail


def versions(request: dict[str, Any]) -> Found:
    """Every distribution of the lock is installed in its version, and no other one."""
    found = {
        re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(): distribution.version
        for distribution in importlib.metadata.distributions(
            path=[p for p in sys.path if "site-packages" in p]
        )
    }
    locked = request["versions"]
    wrong = [
        f"{name} {found.get(name, 'missing')} instead of {version}"
        for name, version in locked.items()
        if found.get(name) != version
    ]
    wrong += [f"{name} {found[name]} is not in the lock" for name in sorted(found.keys() - locked.keys())]
    return not wrong, "; ".join(wrong[:5]) or f"all {len(locked)} as locked"


def forbidden(request: dict[str, Any]) -> Found:
    """No forbidden distribution is installed, such as one that needs CUDA on a Mac."""
    present = []
    for name in request["forbidden"]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            present.append(f"{name} {importlib.metadata.version(name)}")
    return not present, ", ".join(present) or f"none of {', '.join(request['forbidden'])}"


def isolation(request: dict[str, Any]) -> Found:
    """Nothing is imported from outside the environment and the standard library."""
    leaks = []
    if not Path(sys.prefix).samefile(request["prefix"]):
        leaks.append(f"the prefix is {sys.prefix}")
    if site.ENABLE_USER_SITE:
        leaks.append(f"user site {site.getusersitepackages()}")
    leaks += [f"{name} is set" for name in ("PYTHONPATH", "PYTHONHOME") if os.environ.get(name)]
    inside = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, Path(__file__).parent)]
    for entry in sys.path:
        path = Path(entry).resolve()
        if not any(path.is_relative_to(root) for root in inside):
            leaks.append(f"sys.path has {entry}")
        elif "site-packages" in path.parts and not path.is_relative_to(inside[0]):
            leaks.append(f"sys.path has another Python's packages: {entry}")
    return not leaks, "; ".join(leaks) or sys.prefix


def device(request: dict[str, Any]) -> Found:
    """Torch finds the expected device."""
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return found == request[
        "device"
    ], f"torch {torch.__version__} finds {found}, expected {request['device']}"


def accelerator(request: dict[str, Any]) -> Found:
    """Accelerate gives the trainer the expected device and precision, under our configuration."""
    from accelerate import Accelerator

    made = Accelerator()
    found, precision = made.device.type, made.mixed_precision
    good = found == request["device"] and precision == request["mixed_precision"]
    return good, f"Accelerator() is on {found} with mixed precision {precision}"


def training(request: dict[str, Any]) -> Found:
    """Forward, backward and one optimizer step give the same result as on the CPU.

    The tolerance is 1e-3 relative to the largest weight. That is ten times the difference
    between float32 kernels of different devices in a step this small.
    """
    import torch

    def step(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(),
            torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 8, 16),
        )  # fmt: skip
        pictures, target = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loss = torch.nn.functional.mse_loss(model(pictures.to(device)), target.to(device))
        loss.backward()
        optimizer.step()
        return torch.cat(
            [loss.detach().reshape(1).cpu(), *(p.detach().cpu().flatten() for p in model.parameters())]
        )

    result, reference = step(request["device"]), step("cpu")
    difference = float((result - reference).abs().max() / reference.abs().max())
    good = bool(torch.isfinite(result).all()) and difference < 1e-3
    return good, f"one step on {request['device']} differs from the CPU by {difference:.1e} relative"


def imports(request: dict[str, Any]) -> Found:
    """Every module that the trainers import can be imported."""
    failed = []
    for name in request["modules"]:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may fail in any way; the report names it
            failed.append(f"{name}: {type(error).__name__}: {error}")
    return not failed, "; ".join(failed) or f"all {len(request['modules'])} modules import"


def accelerate_env(request: dict[str, Any]) -> Found:
    """``accelerate env`` shows that the configuration does not force the CPU."""
    from accelerate.commands.env import env_command

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        env_command(argparse.Namespace(config_file=request["config_file"]))
    lines = [line.strip("\t -") for line in printed.getvalue().splitlines() if "use_cpu" in line]
    return lines == ["use_cpu: False"], lines[0] if lines else "does not show use_cpu"


CHECKS: tuple[tuple[str, Callable[[dict[str, Any]], Found], str], ...] = (
    ("interpreter", interpreter, "install a native Python 3.11, then `invoke setup`"),
    ("installed versions", versions, "`invoke setup` repairs the environment"),
    ("forbidden packages", forbidden, "`invoke setup` repairs the environment"),
    ("isolation", isolation, "start it through invoke or nox, which clear the environment"),
    ("device", device, "on a Mac: macOS 12.3 or later on Apple Silicon, and not in a virtual machine"),
    ("accelerator", accelerator, "`invoke configure` writes the accelerate configuration again"),
    ("one training step", training, "update macOS (or the GPU driver); then report this with the numbers"),
    ("trainer's modules", imports, "`invoke setup` repairs the environment"),
    ("accelerate env", accelerate_env, "`invoke configure` writes the accelerate configuration again"),
)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = []
    for name, check, fix in CHECKS:
        try:
            good, detail = check(request)
        except Exception as error:  # one broken check must not hide what the others find
            good, detail = False, f"{type(error).__name__}: {error}"
        rows.append({"name": name, "good": good, "detail": detail, "fix": fix})
        print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}", flush=True)
    Path(sys.argv[2]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
