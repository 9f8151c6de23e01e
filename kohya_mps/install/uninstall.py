"""``invoke uninstall``: remove what was installed, and none of the user's files."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import msgspec

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import STATE, Installation
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import check_unused, exclusive_lock
from kohya_mps.core.settings import GUI_PRESETS, Settings

from . import accelerate_config, checkout, generations, git, receipt


class Plan(msgspec.Struct, frozen=True):
    """What would be removed, restored and kept.

    ``link``: whether ``venv`` is our link. ``defaults``: accelerate's default configurations
    that we wrote. ``backups``: the configurations that they replaced. ``user_files``: the
    user's files inside the checkout; while there are any, the checkout is only removed when
    that was requested explicitly.
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
        UsageError: there is no terminal to ask on, and ``yes`` is false.
        Busy: a training runs from it.
    """
    home = Installation(settings.home)
    if not home.state.is_dir():
        absent = Check("installation", Status.SKIP, f"there is none in {home.root}")
        return Report(f"Removal of {home.root}", (absent,))
    with exclusive_lock(home):
        check_unused(home, "remove what it runs from")
        planned = plan(home, delete_my_files)
        for line in describe(home, planned):
            say(line)
        if not yes:
            _ask()
        rows = _carry_out(home, planned)
    return Report(f"Removal of {home.root}", tuple(rows), {"home": str(home.root)})


def plan(home: Installation, delete_my_files: bool) -> Plan:
    """Look at what is there, without changing anything."""
    receipts = [receipt.read(generation) for generation in generations.present(home)]
    defaults = {Path(known.default_config_path) for known in receipts if known}
    defaults.add(accelerate_config.default_location())
    backups = map(accelerate_config.backup, defaults)
    ours = checkout.made_here(home) and (home.root / ".git").exists()
    kept = tuple(user_files(home)) if ours else ()
    return Plan(
        link=home.venv.is_symlink() and not generations.foreign_venv(home),
        defaults=tuple(sorted(path for path in defaults if accelerate_config.is_ours(path))),
        backups=tuple(sorted(path for path in backups if path.exists())),
        remove_checkout=ours and (delete_my_files or not kept),
        user_files=kept,
    )


def user_files(home: Installation) -> list[str]:
    """What a checkout holds beyond the commit's own files: the user's, as far as can be known.

    Changed files, files that git does not track (models, outputs, datasets, ignored ones
    too), stashes, branches, and repositories that were set aside. Compiled Python does not
    count. Paths are relative to the checkout.
    """
    found = []
    for tree, prefix in ((home.root, ""), (home.sd_scripts, f"{checkout.SUBMODULE}/")):
        if not os.path.lexists(tree / ".git"):
            continue
        entries = git.status(tree, "--ignored", "--untracked-files=all")
        found += [prefix + entry for entry in entries if not (_derived(entry) or _our_preset(tree / entry))]
        found += [f"{prefix}stash: {line}" for line in git.output(tree, "stash", "list").splitlines()]
        branches = git.output(tree, "for-each-ref", "--format=%(refname:short)", "refs/heads")
        found += [f"{prefix}branch: {name}" for name in branches.splitlines()]
    return found


def _derived(entry: str) -> bool:
    return (
        "__pycache__/" in entry
        # kohya's page logs its starts in setup.log.
        or entry.rstrip("/") in ("venv", STATE, checkout.SUBMODULE, "setup.log")
        or entry.startswith(f"{STATE}/")
    )


def _our_preset(path: Path) -> bool:
    """Whether this is a link that ``invoke gui`` put among the presets of kohya's page."""
    return path.is_symlink() and path.resolve().parent == GUI_PRESETS


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
        raise UsageError(
            "there is no terminal to ask for confirmation on", "`invoke uninstall --yes` does not ask"
        )
    print("Remove? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise StepFailed("nothing was removed")


def _carry_out(home: Installation, planned: Plan) -> list[Check]:
    """Remove what is planned, the state directory last: until then a killed removal can be repeated."""
    rows = []
    if planned.link:
        home.venv.unlink(missing_ok=True)
        rows.append(Check("environment link", Status.PASS, f"{home.venv} removed"))
    for path in planned.defaults:
        path.unlink(missing_ok=True)
        rows.append(Check("accelerate default", Status.PASS, f"{path} removed"))
    rows += [_restore(path) for path in planned.backups]
    for generation in generations.present(home):
        generations.discard(generation)
        rows.append(Check("environment", Status.PASS, f"{generation.name} removed"))
    if planned.remove_checkout:
        _remove_checkout(home)
        rows.append(Check("checkout", Status.PASS, f"{home.root} removed"))
    elif planned.user_files:
        detail = f"{home.root} stays: it holds {len(planned.user_files)} files of yours"
        fix = "`invoke uninstall --delete-my-files` removes them too"
        rows.append(Check("checkout", Status.WARN, detail, fix))
    _remove_state(home, keep_origin=bool(planned.user_files) and not planned.remove_checkout)
    if not any(home.root.iterdir()):
        home.root.rmdir()
    return rows


def _remove_checkout(home: Installation) -> None:
    """Remove all but our state, and an environment in the checkout that is not ours."""
    for entry in sorted(home.root.iterdir()):
        if entry.name != STATE and not (entry == home.venv and generations.foreign_venv(home)):
            _remove(entry)


def _remove_state(home: Installation, *, keep_origin: bool) -> None:
    """Remove our state; ``keep_origin`` keeps the note that we made the checkout, for a later removal."""
    for entry in home.state.iterdir():
        if not (keep_origin and entry.name == checkout.MADE_HERE):
            _remove(entry)
    if not keep_origin:
        home.state.rmdir()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _restore(path: Path) -> Check:
    original = accelerate_config.original(path)
    if accelerate_config.exists(original):
        detail = f"{original} is not ours and stays; the one that it replaced is {path.name}"
        return Check("accelerate default", Status.WARN, detail)
    path.rename(original)
    return Check("accelerate default", Status.PASS, f"{original} restored")
