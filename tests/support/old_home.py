"""A home as version 0.1.0 left it, for the tests that today's code takes it over.

Everything is written out here and nothing comes from the package, so that what today's
code writes or reads can differ from it. The values are made up; the shapes are those of a
home that version 0.1.0 set up with the real kohya_ss.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.installs import PYTHON, Upstream, git

ACCELERATE_YAML = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: 'NO'
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
MARK = "# Written by kohya-mps; it is replaced only while this digest fits: "
WRITTEN = "2026-11-24T23:55:20+00:00"
LOSSES = [1.1274, 1.0481, 1.229]


@dataclass(frozen=True)
class OldHome:
    """The home, and the names of its generations: the active one, and the one before it."""

    root: Path
    active: str
    before: str


def make_old_home(
    root: Path, upstream: Upstream, lock: Path, wheels: list[Path], default_config: Path
) -> OldHome:
    """Build the home.

    Args:
        root: where.
        upstream: what is checked out.
        lock: the profile's constraints file; the active generation is made from it.
        wheels: what is installed in both generations.
        default_config: accelerate's default configuration, which version 0.1.0 wrote.
    """
    root.mkdir()
    _check_out(root, str(upstream.kohya_ss), upstream.commit)
    (root / "sd-scripts").mkdir(exist_ok=True)
    _check_out(root / "sd-scripts", str(upstream.sd_scripts), upstream.sd_scripts_commit)
    exclude = root / ".git" / "info" / "exclude"
    exclude.parent.mkdir(exist_ok=True)
    exclude.write_text("/.kohya-mps/\n")
    state = root / ".kohya-mps"
    state.mkdir()
    (state / "checkout-made-here").touch()
    (state / "lock").touch()
    default_config.parent.mkdir(parents=True)
    default_config.write_text(f"{MARK}{_sha256(ACCELERATE_YAML.encode())}\n{ACCELERATE_YAML}")
    generations = {"small-0123456789ab": "ab" * 32, "small-ba9876543210": _sha256(lock.read_bytes())}
    for turn, (name, digest) in enumerate(generations.items(), 1):
        path = state / "generations" / name
        _make_generation(path, digest, wheels, upstream, default_config)
        (path / "turn").write_text(str(turn))
    before, active = generations
    (root / "venv").symlink_to(f".kohya-mps/generations/{active}/venv")
    _make_verification(state / "verification")
    return OldHome(root, active, before)


def was_killed(home: OldHome, upstream: Upstream) -> None:
    """What a run leaves that was killed while it switched the checkout to the current commit."""
    holder = {"pid": 2**22 + 1, "mark": "0" * 32, "left": ["1" * 32]}
    (home.root / ".kohya-mps" / "holder.json").write_text(json.dumps(holder))
    move = {"stage": "switch", "came_from": upstream.old, "goes_to": upstream.commit}
    git(home.root, "fetch", "--quiet", "--depth", "1", str(upstream.kohya_ss), upstream.old)
    git(home.root, "checkout", "--quiet", "--detach", upstream.old)
    (home.root / ".kohya-mps" / "moving-kohya_ss.json").write_text(json.dumps(move))
    (home.root / ".git" / "index.lock").touch()
    (home.root / "kohya_gui.py").write_text("ne")


def _check_out(tree: Path, url: str, commit: str) -> None:
    git(tree, "init", "--quiet")
    git(tree, "remote", "add", "origin", url)
    git(tree, "fetch", "--quiet", "--depth", "1", "--no-tags", url, commit)
    git(tree, "update-ref", f"refs/kohya-mps/{commit}", commit)
    git(tree, "checkout", "--quiet", "--detach", commit)


def _make_generation(
    path: Path, lock: str, wheels: list[Path], upstream: Upstream, default_config: Path
) -> None:
    venv = path / "venv"
    site = venv / "lib" / f"python{PYTHON}" / "site-packages"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    interpreter = str(Path(sys.base_prefix) / "bin" / f"python{PYTHON}")
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(interpreter)
    (venv / "pyvenv.cfg").write_text(
        f"home = {Path(interpreter).parent}\nimplementation = CPython\nuv = 0.13.8\nversion_info = {PYTHON}\n"
        "include-system-site-packages = false\nprompt = kohya_ss\n"
    )
    (path / "accelerate.yaml").write_text(ACCELERATE_YAML)
    inventory = _inventory(venv, site, interpreter)
    manifest = {
        "profile": "small",
        "lock": lock,
        "python": f"{PYTHON}.7",
        "interpreter": interpreter,
        "inventory": inventory,
        "seconds": 20.7,
        "gui": False,
    }
    (path / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    versions = {name: each["version"] for name, each in inventory["distributions"].items()}
    receipt = {
        "generation": path.name,
        "profile": "small",
        "lock": lock,
        "python": f"{PYTHON}.7",
        "interpreter": interpreter,
        "distributions": versions,
        "url": str(upstream.kohya_ss),
        "commits": {"kohya_ss": upstream.commit, "sd_scripts": upstream.sd_scripts_commit},
        "mixed_precision": "no",
        "accelerate_config": _sha256(ACCELERATE_YAML.encode()),
        "default_config_path": str(default_config),
        "default_config": _sha256(default_config.read_bytes()),
        "smoke": _verdict("Smoke check", "device", "torch 2.5.1 finds cpu, expected cpu"),
        "train_step": _verdict("kohya's train_network.py", "losses", "3 of 3 steps", LOSSES),
        "seconds": {"machine": 0.0, "checkout": 0.47, "environment": 20.7, "training step": 13.38},
        "written": WRITTEN,
    }
    (path / "receipt.json").write_text(json.dumps(receipt, indent=2))


def _verdict(what: str, check: str, detail: str, losses: list[float] | None = None) -> dict[str, object]:
    return {
        "ok": True,
        "at": WRITTEN,
        "what": what,
        "device": "cpu",
        "checks": [{"name": check, "status": "pass", "detail": detail, "fix": ""}],
        "losses": losses or [],
        "kohya_trainer_ran": bool(losses),
    }


def _inventory(venv: Path, site: Path, interpreter: str) -> dict[str, Any]:
    distributions, total = {}, 0
    for info in sorted(site.glob("*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").partition("-")
        lines = []
        with (info / "RECORD").open(newline="") as file:
            for path, _, _ in csv.reader(file):
                stat = (site / path).stat()
                lines.append(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}")
                total += stat.st_size
        fingerprint = _sha256("\n".join(lines).encode())[:32]
        distributions[name.replace("_", "-")] = {"version": version, "fingerprint": fingerprint}
    configuration = (venv / "pyvenv.cfg").read_text() + interpreter
    return {
        "distributions": distributions,
        "entries": sorted(path.name for path in site.iterdir()),
        "configuration": _sha256(configuration.encode()),
        "bytes": total,
        "incomplete": [],
    }


def _make_verification(path: Path) -> None:
    model = path / "models" / "sd15-small-0123456789ab"
    (model / "model").mkdir(parents=True)
    (model / "model" / "made-small").touch()
    (model / "digests.json").write_text(json.dumps({"model/made-small": _sha256(b"")}))
    (path / "run" / "logs").mkdir(parents=True)
    (path / "run" / "lora.safetensors").write_bytes(b"a LoRA")
    (path / "run" / "trainer.log").write_text("accelerator device: cpu\n")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
