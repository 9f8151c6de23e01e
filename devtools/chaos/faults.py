"""``nox -s chaos``: break set-ups in every way that can be arranged, and see whether one rerun mends them.

It works on a copy of the project, in which locks and settings may be changed. The copy is on the
disk of uv's cache, so that environments are links, as a user's are. A try survives when the fault
cost nothing that was there before and one ``invoke setup`` afterwards ends good.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from devtools import posargs
from devtools.sandbox import SANDBOX
from kohya_mps.core.process import capture, uv
from kohya_mps.core.report import Report
from kohya_mps.core.settings import Settings
from kohya_mps.install import lockfile

from . import damage, disk, kills, network, small_repositories
from .testbed import SMALL, SMALL_PROFILE, CannotTry, NotSurvived, Row, Testbed, end_processes


class ChaosOptions(msgspec.Struct, frozen=True):
    """How many kills and pairs of runs, and which faults; all of them where ``only`` is empty."""

    kills: int = 60
    pairs: int = 20
    only: tuple[str, ...] = ()


class Fault(msgspec.Struct, frozen=True):
    """What ``--only`` can name; ``small`` ones use a lock of a few small packages."""

    run: Callable[[Testbed], Row]
    small: bool = False


def table(options: ChaosOptions) -> dict[str, Fault]:
    """Every fault by its name, in the order in which they are tried."""
    on_rebuild = options.kills // 2
    return {
        "kill-fresh": Fault(partial(kills.kills_fresh, count=options.kills - on_rebuild)),
        "kill-rebuild": Fault(partial(kills.kills_rebuild, count=on_rebuild)),
        "disk-refused": Fault(disk.disk_refused),
        "disk-checkout": Fault(disk.disk_full_checkout),
        "disk-environment": Fault(disk.disk_full_environment, small=True),
        "network-git": Fault(network.network_git),
        "network-index": Fault(network.network_index),
        "checkout": Fault(damage.checkout_damaged),
        "deleted": Fault(damage.file_deleted),
        "edited": Fault(damage.file_edited, small=True),
        "lock": Fault(damage.lock_wrong),
        "read-only": Fault(disk.read_only),
        "clock": Fault(damage.clock_back),
        "pairs": Fault(partial(kills.pairs, count=options.pairs)),
    }


def parse_options(arguments: Sequence[str]) -> ChaosOptions:
    """The options of ``nox -s chaos``."""
    default = ChaosOptions()
    parser = posargs.parser("chaos", "Break set-ups, and see whether one rerun mends each.")
    parser.add_argument(
        "--kills", type=int, default=default.kills, help="half on a fresh install, half on a rebuild"
    )
    parser.add_argument(
        "--pairs", type=int, default=default.pairs, help="how often two runs are started together"
    )
    parser.add_argument(
        "--only", choices=tuple(table(default)), action="append", help="this fault; repeatable"
    )
    parsed = parser.parse_args(arguments)
    return ChaosOptions(parsed.kills, parsed.pairs, tuple(parsed.only or ()))


def run(settings: Settings, options: ChaosOptions) -> Report:
    """Try every selected fault.

    The checkout is the real kohya_ss when ``KOHYA_REPO_URL`` and ``KOHYA_COMMIT`` name it. It is
    otherwise a stand-in that is made here and has no trainer.
    """
    faults = table(options)
    rows = []
    with tempfile.TemporaryDirectory(prefix="chaos-", dir=_on_the_disk_of_uvs_cache()) as directory:
        real = bool(os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT"))
        if not real:
            settings = small_repositories.make(Path(directory), settings)
        testbeds = {
            False: _testbed(Path(directory) / "real", settings, real=real),
            True: _small_testbed(Path(directory) / "small", settings, real=real),
        }
        for name in options.only or faults:
            testbed = testbeds[faults[name].small]
            try:
                rows.append(attempt(name, faults[name], testbed))
            finally:
                end_processes(testbed.home)
    survived, tries = sum(row.survived for row in rows), sum(row.tries for row in rows)
    summary = ("", f"{survived} of {tries} tries survived.")
    return Report("Chaos", tuple(row.check() for row in rows), {"rows": rows}, summary)


def attempt(name: str, fault: Fault, testbed: Testbed) -> Row:
    """Try a fault; its row says so where this machine does not allow it or nothing could be prepared."""
    try:
        return fault.run(testbed)
    except CannotTry as reason:
        return Row(name, 0, 0, "", skipped=str(reason))
    except NotSurvived as reason:
        # Not one try of the fault, but the preparation of them all.
        testbed.remove()
        return Row(name, 1, 0, "", (str(reason),))


def _on_the_disk_of_uvs_cache() -> Path:
    """A directory on the disk of uv's cache: links do not cross file systems."""
    SANDBOX.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(capture([uv(), "cache", "dir"]).stdout.strip())
    same = cache.is_dir() and cache.stat().st_dev == SANDBOX.parent.stat().st_dev
    return SANDBOX.parent if same or not cache.is_dir() else cache.parent


def _testbed(root: Path, settings: Settings, *, real: bool) -> Testbed:
    root.mkdir()
    return Testbed(root, settings, settings.profile_name, real=real)


def _small_testbed(root: Path, settings: Settings, *, real: bool) -> Testbed:
    root.mkdir()
    testbed = Testbed(root, settings, SMALL_PROFILE, real=real)
    pins = {pin.name: pin for pin in lockfile.read(settings.profile.lock_file).pins}
    lines = [
        f"{name}=={pins[name].version} {' '.join(f'--hash={digest}' for digest in pins[name].hashes)}\n"
        for name in SMALL
    ]
    testbed.use_small_lock("".join(lines))
    return testbed
