"""``invoke status``: the installation compared with its receipt, without importing torch."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.run_lock import holder_pid
from kohya_mps.core.settings import Settings
from kohya_mps.core.text import format_size

from . import accelerate_config, checkout, generations, inventory, lockfile, receipt
from .generations import Generation
from .receipt import Receipt

REPAIR = "`invoke setup` repairs it"


class Listed(msgspec.Struct, frozen=True):
    """A generation as the report lists it; ``bytes`` includes files that generations share."""

    name: str
    active: bool
    complete: bool
    profile: str | None
    bytes: int | None
    verified: bool | None


def status(settings: Settings) -> Report:
    """Report everything that differs from the receipt, each with the command that repairs it."""
    home = Installation(settings.home)
    active = generations.active(home)
    known = receipt.read(active) if active else None
    checks = [
        *_run_in_progress(home),
        *_checkout(home, settings, known),
        *_environment(home, settings, active),
    ]
    if active:
        checks += _configuration(active, known)
    checks += _interrupted(home)
    checks += _verification(known)
    extra = {"home": str(home.root), "generations": listed(home), "receipt": known}
    lines = [
        f"{'*' if g.active else ' '} {g.name}"
        + (f"  {format_size(g.bytes)} (shared with uv's cache)" if g.bytes else "  interrupted")
        for g in listed(home)
    ]
    return Report(
        f"Status of {home.root}", tuple(checks), extra, ("", "generations:", *lines) if lines else ()
    )


def listed(home: Installation) -> list[Listed]:
    """The generations of a home, the active one first."""
    active = generations.active(home)
    rows = []
    for generation in generations.present(home):
        manifest, known = generation.manifest(), receipt.read(generation)
        verified = bool(known.smoke and known.smoke.ok) if known else None
        size = manifest.inventory.bytes if manifest else None
        profile = manifest.profile if manifest else None
        rows.append(
            Listed(generation.name, generation == active, manifest is not None, profile, size, verified)
        )
    return sorted(rows, key=lambda row: not row.active)


def _run_in_progress(home: Installation) -> list[Check]:
    pid = holder_pid(home)
    if pid is None:
        return []
    return [
        Check("run in progress", Status.WARN, f"process {pid} is running here; the rows below may change")
    ]


def _checkout(home: Installation, settings: Settings, known: Receipt | None) -> list[Check]:
    present = checkout.present(home)
    if present is None:
        return [Check("checkout", Status.FAIL, f"there is none in {home.root}", "`invoke setup` makes it")]
    pinned = known.commits.kohya_ss if known and known.commits else settings.commit
    rows = [_commit("kohya_ss", present.kohya_ss, pinned)]
    try:
        linked = checkout.gitlink(home, present.kohya_ss)
        rows.append(_commit(checkout.SUBMODULE, present.sd_scripts, linked))
        changed = [*checkout.local_changes(home.root)]
        changed += [f"{checkout.SUBMODULE}/{name}" for name in checkout.local_changes(home.sd_scripts)]
    except StepFailed as error:
        return [*rows, Check("checkout", Status.FAIL, error.what, REPAIR)]
    fix = "commit or revert it, or `invoke clone --stash` puts it away"
    return [
        *rows,
        *(Check(f"file {name}", Status.FAIL, "changed since it was checked out", fix) for name in changed),
    ]


def _commit(name: str, found: str, pinned: str) -> Check:
    detail = found if found == pinned else f"is at {found}, not at {pinned}"
    return Check.of(name, found == pinned, detail, "`invoke clone` checks it out again")


def _environment(home: Installation, settings: Settings, active: Generation | None) -> list[Check]:
    name = "environment"
    if generations.foreign_venv(home):
        fix = "`invoke setup --replace-venv` moves it aside and builds ours"
        return [Check(name, Status.FAIL, f"{home.venv} was not built by this project", fix)]
    manifest = active.manifest() if active else None
    if active is None or manifest is None:
        return [Check(name, Status.FAIL, "there is none", "`invoke setup` builds it")]
    drift = inventory.differences(manifest.inventory, inventory.take(active.venv))
    rows = [Check(f"package {d.name}", Status.FAIL, f"{d.kind}: {d.detail}", REPAIR) for d in drift]
    if not active.python.exists():
        rows.append(Check("interpreter", Status.FAIL, f"{manifest.interpreter} is gone", REPAIR))
    if not rows:
        count = len(manifest.inventory.distributions)
        rows.append(Check(name, Status.PASS, f"{active.name}: {count} packages as they were installed"))
    lock = settings.profile.lock_for(gui=manifest.gui)
    if manifest.profile != settings.profile_name or manifest.lock != lockfile.digest(lock):
        detail = f"built from another lock than the profile {settings.profile_name} has now ({lock.name})"
        rows.append(Check("lock", Status.WARN, detail, "`invoke setup` builds the environment of that lock"))
    return rows


def _configuration(active: Generation, known: Receipt | None) -> list[Check]:
    name, path = "accelerate configuration", active.accelerate_config
    fix = "`invoke configure` writes it again"
    if not path.exists():
        return [Check(name, Status.FAIL, f"{path} is missing", fix)]
    if known is None:
        return []
    same = receipt.config_digest(active) == known.accelerate_config
    rows = [Check.of(name, same, str(path) if same else f"{path} was edited", fix)]
    default = Path(known.default_config_path)
    if known.default_config and receipt.default_digest(default) != known.default_config:
        what = (
            "was edited or replaced; it is yours now" if accelerate_config.exists(default) else "was removed"
        )
        rows.append(
            Check("accelerate default", Status.WARN, f"{default} {what}; our launches do not read it")
        )
    return rows


def _interrupted(home: Installation) -> list[Check]:
    rows = [
        Check(f"build {generation.name}", Status.WARN, "was interrupted", "`invoke setup` removes it")
        for generation in generations.present(home)
        if generation.manifest() is None and holder_pid(home) is None
    ]
    if checkout.was_interrupted(home) and holder_pid(home) is None:
        rows.append(
            Check(
                "checkout",
                Status.WARN,
                "a switch to another commit was interrupted",
                "`invoke setup` finishes it",
            )
        )
    return rows


def _verification(known: Receipt | None) -> list[Check]:
    if known is None:
        return [
            Check(
                "receipt",
                Status.WARN,
                "there is none: the set-up was not finished",
                "`invoke setup` finishes it",
            )
        ]
    rows = []
    for name, verdict in (("smoke check", known.smoke), ("training step", known.train_step)):
        if verdict is None:
            rows.append(Check(name, Status.WARN, "not run on this installation", "`invoke verify` runs it"))
        else:
            what = (
                f"{'passed' if verdict.ok else 'failed'} on {verdict.device or 'no device'} at {verdict.at}"
            )
            rows.append(Check.of(name, verdict.ok, what, "`invoke verify` runs it again"))
    return rows
