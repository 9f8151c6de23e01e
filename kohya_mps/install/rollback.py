"""``invoke rollback``: back to the generation that was active before, its commit and configuration."""

from __future__ import annotations

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import Settings

from . import accelerate_config, checkout, generations, inventory, receipt, status
from .generations import Generation


def rollback(settings: Settings, to: str = "") -> Report:
    """Make an earlier generation active, and check out the commit that its receipt records.

    The link to the environment is switched last: a run that was killed can be repeated.

    Args:
        settings: the home.
        to: a generation's name; empty for the one that was active before.

    Raises:
        UsageError: there is no such generation, it was changed, or the checkout has local changes.
        Busy: another run holds this installation, or a training runs from the checkout.
    """
    home = Installation(settings.home)
    check_location(home)
    with exclusive_lock(home):
        target = _target(home, to)
        known = receipt.read(target)
        if known and known.commits:
            checkout.ensure_checkout(msgspec.structs.replace(settings, commit=known.commits.kohya_ss))
        if target.accelerate_config.exists():
            default = accelerate_config.write_default(target)
        else:
            default = Check(
                "accelerate configuration", Status.WARN, "never written", "`invoke configure` writes it"
            )
        generations.activate(home, target)
    commits = checkout.present(home)
    rows = (
        Check("environment", Status.PASS, f"{target.name} is active"),
        Check("checkout", Status.PASS, commits.kohya_ss if commits else "there is none"),
        default,
    )
    return Report(f"Rollback of {home.root}", rows, {"generation": target.name, "commits": commits})


def choices(settings: Settings) -> Report:
    """``invoke rollback --list``: the generations, and the commit that each was set up with."""
    home = Installation(settings.home)
    rows = []
    for row in status.listed(home):
        if row.complete:
            known = receipt.read(Generation(home.generations / row.name))
            commit = known.commits.kohya_ss[:12] if known and known.commits else "no commit recorded"
            written = known.written if known else "not verified"
            rows.append(
                Check(row.name, Status.PASS, f"{'active, ' if row.active else ''}{commit}, {written}")
            )
    return Report(f"Generations of {home.root}", tuple(rows), {"generations": status.listed(home)})


def _target(home: Installation, to: str) -> Generation:
    target = Generation(home.generations / to) if to else generations.previous(home)
    if target is None:
        raise UsageError(
            f"{home.root} has no earlier generation", "`invoke setup` makes one when the lock changes"
        )
    manifest = target.manifest() if "/" not in to else None
    if manifest is None:
        raise UsageError(
            f"there is no generation {to!r} in {home.root}", "`invoke rollback --list` shows them"
        )
    if drift := inventory.differences(manifest.inventory, inventory.take(target.venv)):
        names = ", ".join(d.name for d in drift[:5])
        raise UsageError(
            f"{target.name} is no longer as it was built: {names}", "`invoke setup` builds what the lock says"
        )
    return target
