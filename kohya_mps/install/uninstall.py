"""``invoke uninstall``: remove what was installed, and nothing that is the user's."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import STATE, Installation
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import check_unused, exclusive_lock
from kohya_mps.core.settings import Settings

from . import accelerate_config, checkout, generations, receipt


class Plan(msgspec.Struct, frozen=True):
    """What would go, what would be restored and what stays.

    ``user_files`` are the user's things inside the checkout; while there are any, the
    checkout stays unless they were given up explicitly.
    """

    link: bool
    defaults: tuple[Path, ...]
    backups: tuple[Path, ...]
    remove_checkout: bool
    user_files: tuple[str, ...]


def uninstall(settings: Settings, *, yes: bool = False, delete_my_files: bool = False) -> Report:
    """Remove the installation of a home.

    Args:
        settings: the home.
        yes: do not ask; never implies ``delete_my_files``.
        delete_my_files: remove the checkout even where it holds the user's files.

    Raises:
        UsageError: nobody can be asked and ``yes`` was not given.
        Busy: a training runs from it.
    """
    home = Installation(settings.home)
    if not home.state.is_dir():
        nothing = Check("installation", Status.SKIP, f"there is none in {home.root}")
        return Report(f"Removal of {home.root}", (nothing,))
    with exclusive_lock(home):
        check_unused(home, "remove it under it")
        planned = plan(home, delete_my_files)
        for line in describe(home, planned):
            say(line)
        if not yes:
            _ask()
        rows = _carry_out(home, planned)
    return Report(f"Removal of {home.root}", tuple(rows), {"home": str(home.root)})


def plan(home: Installation, delete_my_files: bool) -> Plan:
    """Look at what is there; nothing is changed."""
    receipts = [receipt.read(generation) for generation in generations.present(home)]
    places = {Path(known.default_config_path) for known in receipts if known}
    places.add(accelerate_config.default_location())
    ours = checkout.made_here(home) and (home.root / ".git").exists()
    user_files = tuple(checkout.user_files(home)) if ours else ()
    return Plan(
        link=home.venv.is_symlink() and not generations.foreign_venv(home),
        defaults=tuple(sorted(place for place in places if accelerate_config.is_ours(place))),
        backups=tuple(
            sorted(
                accelerate_config.backup(place)
                for place in places
                if accelerate_config.backup(place).exists()
            )
        ),
        remove_checkout=ours and (delete_my_files or not user_files),
        user_files=user_files,
    )


def describe(home: Installation, planned: Plan) -> list[str]:
    """The plan in lines for a person."""
    lines = ["This will be removed:"]
    lines += [f"  {home.venv} (a link)"] if planned.link else []
    lines += [f"  {home.state} (environments, configuration, generated models)"]
    lines += [f"  {path}" for path in planned.defaults]
    if planned.remove_checkout:
        lines.append(f"  {home.root} (the checkout)")
        if planned.user_files:
            lines += [f"    with YOUR files: {len(planned.user_files)} of them"]
            lines += [f"      {name}" for name in planned.user_files[:20]]
    lines += [
        f"This will be restored:\n  {path} as {accelerate_config.original(path).name}"
        for path in planned.backups
    ]
    if not planned.remove_checkout and (home.root / ".git").exists():
        why = "it was there before this project" if not planned.user_files else "it holds files of yours:"
        lines.append(f"This stays: {home.root}, because {why}")
        lines += [f"      {name}" for name in planned.user_files[:20]]
        if planned.user_files:
            lines.append("  (--delete-my-files removes the checkout with them)")
    return lines


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UsageError("nobody is here to confirm", "`invoke uninstall --yes` does not ask")
    print("Remove? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise StepFailed("nothing was removed")


def _carry_out(home: Installation, planned: Plan) -> list[Check]:
    """The state directory goes last: until then a killed removal can be repeated."""
    rows = []
    if planned.link:
        home.venv.unlink(missing_ok=True)
        rows.append(Check("environment link", Status.PASS, f"{home.venv} removed"))
    for path in planned.defaults:
        path.unlink(missing_ok=True)
        rows.append(Check("accelerate default", Status.PASS, f"{path} removed"))
    for path in planned.backups:
        rows.append(_restore(path))
    for generation in generations.present(home):
        generations.discard(generation)
        rows.append(Check("environment", Status.PASS, f"{generation.name} removed"))
    if planned.remove_checkout:
        for entry in sorted(home.root.iterdir()):
            # A foreign environment in the checkout was there before, or was made by somebody else.
            if entry.name != STATE and not (entry == home.venv and generations.foreign_venv(home)):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        rows.append(Check("checkout", Status.PASS, f"{home.root} removed"))
    elif planned.user_files:
        detail = f"{home.root} stays: it holds {len(planned.user_files)} files of yours"
        rows.append(
            Check("checkout", Status.WARN, detail, "`invoke uninstall --delete-my-files` removes them too")
        )
    kept = {checkout.MADE_HERE} if planned.user_files and not planned.remove_checkout else set()
    for entry in home.state.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not kept:
        home.state.rmdir()
    if not any(home.root.iterdir()):
        home.root.rmdir()
    return rows


def _restore(path: Path) -> Check:
    original = accelerate_config.original(path)
    if accelerate_config.exists(original):
        detail = f"{original} is not ours and stays; the one from before is {path.name}"
        return Check("accelerate default", Status.WARN, detail)
    path.rename(original)
    return Check("accelerate default", Status.PASS, f"{original} restored")
