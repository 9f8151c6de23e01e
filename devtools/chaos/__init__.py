"""``nox -s chaos``: break set-ups in every way that can be arranged, and see whether one rerun mends them.

It works on a copy of the project, in which locks and settings may be changed, beside uv's
cache, so that environments are links as a user's are. A try survives when the damage cost
nothing that was there before and one ``invoke setup`` afterwards ends good.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from devtools import posargs
from devtools.sandbox import SANDBOX
from kohya_mps.core.process import capture, clean_environ, uv
from kohya_mps.core.report import Report
from kohya_mps.core.settings import Settings
from kohya_mps.install import lockfile
from kohya_mps.install.checkout import SUBMODULE

from . import damage, disk, kills, network
from .testbed import SMALL, SMALL_PROFILE, CannotTry, NotSurvived, Row, Testbed, end_processes, expect


class Fault(msgspec.Struct, frozen=True):
    """What can be asked for with ``--only``; ``small`` ones use the stand-in lock."""

    run: Callable[[Testbed, argparse.Namespace], Row]
    small: bool = False


FAULTS = {
    "kill-fresh": Fault(lambda place, given: kills.kills_fresh(place, given.kills - given.kills // 2)),
    "kill-rebuild": Fault(lambda place, given: kills.kills_rebuild(place, given.kills // 2)),
    "disk-refused": Fault(lambda place, _: disk.disk_refused(place)),
    "disk-checkout": Fault(lambda place, _: disk.disk_full_checkout(place)),
    "disk-environment": Fault(lambda place, _: disk.disk_full_environment(place), small=True),
    "network-git": Fault(lambda place, _: network.network_git(place)),
    "network-index": Fault(lambda place, _: network.network_index(place)),
    "checkout": Fault(lambda place, _: damage.checkout_damaged(place)),
    "deleted": Fault(lambda place, _: damage.file_deleted(place)),
    "edited": Fault(lambda place, _: damage.file_edited(place), small=True),
    "lock": Fault(lambda place, _: damage.lock_wrong(place)),
    "read-only": Fault(lambda place, _: disk.read_only(place)),
    "clock": Fault(lambda place, _: damage.clock_back(place)),
    "pairs": Fault(lambda place, given: kills.pairs(place, given.pairs)),
}


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``nox -s chaos``."""
    parser = posargs.parser("chaos", "Break set-ups, and mend them.")
    parser.add_argument("--kills", type=int, default=60, help="half on a fresh install, half on a rebuild")
    parser.add_argument("--pairs", type=int, default=20, help="how often two runs are started together")
    parser.add_argument("--only", choices=tuple(FAULTS), action="append", help="this fault; repeatable")
    return parser.parse_args(arguments)


def run(settings: Settings, given: argparse.Namespace) -> Report:
    """Try every fault that was asked for.

    The checkout is the real kohya_ss when ``KOHYA_REPO_URL`` and ``KOHYA_COMMIT`` name it,
    else a stand-in that is made here and has no trainer.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=_beside_uvs_cache()) as directory:
        real = bool(os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT"))
        if not real:
            settings = _stand_in(Path(directory), settings)
        places = {
            small: _place(Path(directory) / ("small" if small else "real"), settings, small=small, real=real)
            for small in (False, True)
        }
        for name in given.only or FAULTS:
            place = places[FAULTS[name].small]
            try:
                rows.append(_try(name, place, given))
            finally:
                end_processes(place.home)
    survived = sum(row.survived for row in rows)
    tries = sum(row.tries for row in rows)
    summary = ("", f"{survived} of {tries} tries survived.")
    return Report("Chaos", tuple(row.check() for row in rows), {"rows": rows}, summary)


def _try(name: str, place: Testbed, given: argparse.Namespace) -> Row:
    try:
        return FAULTS[name].run(place, given)
    except CannotTry as reason:
        return Row(name, 0, 0, "", skipped=str(reason))
    except NotSurvived as reason:
        # Not one try of the fault, but what comes before them all.
        place.remove()
        return Row(name, 1, 0, "", (str(reason),))


def _beside_uvs_cache() -> Path:
    """On the disk of uv's cache: links do not cross file systems."""
    SANDBOX.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(capture([uv(), "cache", "dir"]).stdout.strip())
    same = cache.is_dir() and cache.stat().st_dev == SANDBOX.parent.stat().st_dev
    return SANDBOX.parent if same or not cache.is_dir() else cache.parent


def _place(root: Path, settings: Settings, *, small: bool, real: bool) -> Testbed:
    root.mkdir()
    if not small:
        return Testbed(root, settings, settings.profile_name, real=real)
    place = Testbed(root, settings, SMALL_PROFILE, real=real)
    pins = {pin.name: pin for pin in lockfile.read(settings.profile.lock_file).pins}
    lines = [
        f"{name}=={pins[name].version} {' '.join(f'--hash={digest}' for digest in pins[name].hashes)}\n"
        for name in SMALL
    ]
    place.use_small_lock("".join(lines))
    return place


def _stand_in(root: Path, settings: Settings) -> Settings:
    """Two small repositories in the places of kohya_ss and sd-scripts."""
    kohya_ss, sd_scripts = root / "kohya_ss", root / "sd-scripts"
    for path, name in ((sd_scripts, "train_network.py"), (kohya_ss, "kohya_gui.py")):
        path.mkdir()
        _git(path, "init", "--quiet")
        (path / name).write_text("raise SystemExit('a stand-in')\n", encoding="utf-8")
        for n in range(200):
            (path / f"file{n}.py").write_text(f"# {os.urandom(2000).hex()}\n", encoding="utf-8")
        _git(path, "add", "--all")
        _git(path, "commit", "--quiet", "--message", "a stand-in")
    module = f'[submodule "{SUBMODULE}"]\n\tpath = {SUBMODULE}\n\turl = {sd_scripts}\n'
    (kohya_ss / ".gitmodules").write_text(module, encoding="utf-8")
    gitlink = _git(sd_scripts, "rev-parse", "HEAD")
    _git(kohya_ss, "add", ".gitmodules")
    _git(kohya_ss, "update-index", "--add", "--cacheinfo", f"160000,{gitlink},{SUBMODULE}")
    _git(kohya_ss, "commit", "--quiet", "--message", "with its submodule")
    return msgspec.structs.replace(settings, url=str(kohya_ss), commit=_git(kohya_ss, "rev-parse", "HEAD"))


def _git(path: Path, *arguments: str) -> str:
    somebody = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "chaos"), ("EMAIL", "chaos@example.invalid"))
    }
    done = capture(["git", "-C", path, *arguments], env=clean_environ(extra=somebody))
    expect(done.returncode == 0, f"git {arguments[0]} failed in {path}: {done.stderr.strip()}")
    return done.stdout.strip()
