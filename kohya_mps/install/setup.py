"""``invoke setup`` and ``invoke verify``: the steps in their order, each told, timed and judged.

A step that does not depend on a failed one still runs: where the repository cannot be
reached, everything else is done, and the next run has only the rest left.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator

import msgspec

from kohya_mps.core.errors import KohyaError, StepFailed, UsageError
from kohya_mps.core.installation import Installation, check_location
from kohya_mps.core.machine import expected_architecture, expected_device, on_mac
from kohya_mps.core.process import capture
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import Settings, without_secret

from . import accelerate_config, checkout, environment, generations, receipt, smoke_check, training_step
from .accelerate_config import ProcessLayout
from .checkout import Commits
from .environment import Plan
from .generations import Generation
from .receipt import Receipt, Verdict


class SetupOptions(msgspec.Struct, frozen=True):
    """What ``invoke setup`` was asked for besides the settings.

    ``gui`` is whether kohya's web page is to be installed; when not said, it stays as it is.
    """

    smoke: bool = True
    train_step: bool = True
    stash: bool = False
    replace_default: bool = False
    replace_venv: bool = False
    gui: bool | None = None

    def with_gui(self, gui: bool, no_gui: bool) -> SetupOptions:
        """The same, and what ``--gui`` and ``--no-gui`` say of the web page.

        Raises:
            UsageError: both were given.
        """
        if gui and no_gui:
            raise UsageError("--gui and --no-gui were both given", "give one of them")
        return msgspec.structs.replace(self, gui=gui) if gui or no_gui else self


class _Steps:
    """The rows of the report, made by running steps; a failed step is a row, not the end."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.checks: list[Check] = []
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[Status, str, str], None]]:
        """Run the block as a step; it says how it went through what it is given."""
        say(f"[{len(self.checks) + 1}/{self.total}] {name}")
        outcome: list[Check] = []
        started = time.monotonic()
        try:
            yield lambda status, detail, fix: outcome.append(Check(name, status, detail, fix))
        except KohyaError as error:
            outcome = [Check(name, Status.FAIL, error.what, error.fix)]
        took = time.monotonic() - started
        self.seconds[name] = round(took, 2)
        row = outcome[-1]
        self.checks.append(msgspec.structs.replace(row, detail=f"{row.detail} ({took:.1f} s)"))
        say(f"      {row.status}: {row.detail.splitlines()[0]} ({took:.1f} s)")

    def skip(self, name: str, why: str) -> None:
        """A step that has nothing to run on, or was not asked for."""
        say(f"[{len(self.checks) + 1}/{self.total}] {name}\n      skip: {why}")
        self.checks.append(Check(name, Status.SKIP, why))


def setup(settings: Settings, wanted: SetupOptions) -> Report:
    """Bring the installation to what the settings say, from whatever state it is in.

    Raises:
        UsageError: the place or the settings cannot be meant.
        Busy: another run holds this installation.
    """
    home = Installation(settings.home)
    check_location(home)
    accelerate_config.check_precision(settings)
    planned = environment.plan(settings, gui=wanted.gui)
    ready = check_machine(settings, planned)
    if ready.status is Status.FAIL:
        return Report("Setup", (ready,), {"home": str(home.root), "device": None})
    with exclusive_lock(home):
        return _setup(settings, wanted, home, planned, ready)


def _setup(
    settings: Settings, wanted: SetupOptions, home: Installation, planned: Plan, ready: Check
) -> Report:
    steps = _Steps(total=6)
    with steps.step("machine") as tell:
        tell(ready.status, ready.detail, ready.fix)
        generations.set_aside_foreign_venv(home, replace=wanted.replace_venv)
    if steps.checks[-1].status is Status.FAIL:
        return Report("Setup", tuple(steps.checks), {"home": str(home.root), "device": None})
    commits: Commits | None = None
    with steps.step("checkout") as tell:
        before = checkout.present(home)
        commits = checkout.ensure_checkout(settings, stash=wanted.stash)
        tell(
            Status.PASS,
            f"kohya_ss {commits.kohya_ss[:12]} {'in place' if commits == before else 'checked out'}",
            "",
        )
    generation: Generation | None = None
    with steps.step("environment") as tell:
        generation = environment.build(settings, planned)
        built = "in place" if generation == planned.usable else "built"
        tell(
            Status.PASS,
            f"{generation.name} {built}: {len(planned.lock.pins)} pins of {planned.lock.path.name}",
            "",
        )
    if generation is None:
        for name in ("configuration", "smoke check", "training step"):
            steps.skip(name, "there is no environment")
        return _summarize(settings, home, steps, None, None)
    with steps.step("configuration") as tell:
        configured = accelerate_config.configure(settings, generation, replace_default=wanted.replace_default)
        row = max(configured.checks, key=lambda check: check.status is not Status.PASS)
        tell(row.status, row.detail, row.fix)
    known = receipt.read(generation)
    smoked = _smoke(settings, wanted, steps, generation, known)
    if smoked is None or smoked.ok or generations.active(home) is None:
        generations.activate(home, generation)
    trained = _train(settings, wanted, steps, generation, home, commits, known)
    record = _record(settings, generation, commits, smoked, trained, steps)
    if known is None or _without_times(known) != _without_times(record):
        receipt.save(generation, record)
    generations.prune(home, settings.generations_kept)
    return _summarize(settings, home, steps, generation, record)


def verify(settings: Settings, *, full: bool = False) -> Report:
    """Run the smoke check and the training step on what is installed, and record the verdicts.

    Args:
        settings: the home and the profile.
        full: train a model of Stable Diffusion 1.5's full size.
    """
    home = Installation(settings.home)
    generation = installed(home, settings.profile_name)
    with exclusive_lock(home):
        smoked = smoke_check.run(settings, generation)
        commits = checkout.present(home)
        options = training_step.TrainingStepOptions(
            full=full and commits is not None, builtin=commits is None
        )
        trained = training_step.run(settings, generation, home.root, home.verification, options)
        if known := receipt.read(generation):
            verdicts = {"smoke": receipt.verdict(smoked), "train_step": receipt.verdict(trained)}
            receipt.save(generation, msgspec.structs.replace(known, written=receipt.now(), **verdicts))
    extra = {**trained.extra, "smoke": smoked.checks, "train_step": trained.checks}
    return Report(f"Verification of {home.root}", (*smoked.checks, *trained.checks), extra)


def configure(settings: Settings, replace_default: bool, layout: ProcessLayout | None = None) -> Report:
    """``invoke configure``: write the configuration anew; verdicts on another one no longer hold.

    Args:
        settings: the mixed precision.
        replace_default: back up somebody else's default configuration and replace it.
        layout: how trainings are spread; as it was when not given.
    """
    home = Installation(settings.home)
    generation = installed(home, settings.profile_name)
    with exclusive_lock(home):
        report = accelerate_config.configure(settings, generation, replace_default=replace_default)
        if layout:
            report = report.plus([accelerate_config.configure_distributed(settings, generation, layout)])
        known = receipt.read(generation)
        if known and (changed := _reconfigured(settings, generation, known)) != known:
            receipt.save(generation, changed)
    return report


def _reconfigured(settings: Settings, generation: Generation, known: Receipt) -> Receipt:
    same = _same_inputs(settings, generation, known)
    return msgspec.structs.replace(
        known,
        mixed_precision=settings.mixed_precision,
        accelerate_config=receipt.config_digest(generation),
        default_config=receipt.default_digest(accelerate_config.default_location()),
        default_config_path=str(accelerate_config.default_location()),
        smoke=known.smoke if same else None,
        train_step=known.train_step if same else None,
    )


def installed(home: Installation, profile: str = "") -> Generation:
    """The active generation.

    Args:
        home: where it is installed.
        profile: what it has to be of, where that profile's rules or lock are applied to it.

    Raises:
        UsageError: nothing is installed in this home, it is of another profile, or others
            can write to it.
    """
    check_location(home)
    generation = generations.active(home)
    manifest = generation.manifest() if generation else None
    if generation is None or manifest is None:
        raise UsageError(f"there is no environment in {home.root}", "`invoke setup` builds it")
    if profile and manifest.profile != profile:
        raise UsageError(
            f"the active environment is of the profile {manifest.profile}, and {profile} is asked for",
            f"KOHYA_PROFILE={manifest.profile} asks for the one that is there; `invoke setup` installs {profile}",
        )
    return generation


def check_machine(settings: Settings, planned: Plan) -> Check:
    """What has to be there before anything is touched: architecture, git, Python and disk."""
    name = "machine"
    machine, wanted = platform.machine(), expected_architecture()
    if machine != wanted:
        what = (
            "this Python runs under Rosetta, or this is an Intel Mac"
            if on_mac()
            else "there are no wheels for it"
        )
        fix = (
            "install a native arm64 Python 3.11 and make .venv anew" if on_mac() else "use an x86-64 machine"
        )
        return Check(name, Status.FAIL, f"architecture {machine}, not {wanted}: {what}", fix)
    try:
        git = capture(["git", "--version"])
    except StepFailed:
        git = None
    if git is None or git.returncode:
        fix = "`xcode-select --install`" if on_mac() else "install git with your package manager"
        return Check(name, Status.FAIL, "git was not found, or does not run", fix)
    if planned.usable is None:
        try:
            environment.find_python(settings.profile)
            if planned.changed is None:
                environment.check_disk(Installation(settings.home), settings.profile)
        except KohyaError as error:
            return Check(name, Status.FAIL, error.what, error.fix)
    return Check(
        name,
        Status.PASS,
        f"{platform.system()} {machine}, {git.stdout.strip()}, expected device {expected_device()}",
    )


def _smoke(
    settings: Settings, wanted: SetupOptions, steps: _Steps, generation: Generation, known: Receipt | None
) -> Verdict | None:
    if not wanted.smoke:
        steps.skip("smoke check", "not asked for")
        return known.smoke if known else None
    if known and known.smoke and known.smoke.ok and _same_inputs(settings, generation, known):
        steps.skip(
            "smoke check",
            f"passed on {known.smoke.device} at {known.smoke.at}; `invoke verify` runs it again",
        )
        return known.smoke
    outcome: Verdict | None = None
    with steps.step("smoke check") as tell:
        result = smoke_check.run(settings, generation)
        outcome = receipt.verdict(result)
        bad = [check for check in result.checks if check.status is Status.FAIL]
        if bad:
            tell(Status.FAIL, "; ".join(f"{check.name}: {check.detail}" for check in bad), bad[0].fix)
        else:
            tell(Status.PASS, f"{len(result.checks)} checks on {outcome.device}", "")
    return outcome


def _train(
    settings: Settings,
    wanted: SetupOptions,
    steps: _Steps,
    generation: Generation,
    home: Installation,
    commits: Commits | None,
    known: Receipt | None,
) -> Verdict | None:
    if not (wanted.train_step and wanted.smoke):
        steps.skip("training step", "not asked for")
        return known.train_step if known else None
    done = known.train_step if known else None
    if known and done and done.ok and known.commits == commits and _same_inputs(settings, generation, known):
        steps.skip("training step", f"passed on {done.device} at {done.at}; `invoke verify` runs it again")
        return done
    outcome: Verdict | None = None
    with steps.step("training step") as tell:
        options = training_step.TrainingStepOptions(builtin=commits is None)
        result = training_step.run(settings, generation, home.root, home.verification, options)
        outcome = receipt.verdict(result)
        bad = [check for check in result.checks if check.status is Status.FAIL]
        if bad:
            tell(Status.FAIL, "; ".join(f"{check.name}: {check.detail}" for check in bad), bad[0].fix)
        else:
            losses = ", ".join(f"{loss:.4f}" for loss in outcome.losses)
            tell(Status.PASS, f"on {outcome.device}, {outcome.what}; losses {losses}", "")
    return outcome


def _same_inputs(settings: Settings, generation: Generation, known: Receipt) -> bool:
    """Whether an earlier verdict still speaks of this configuration (the lock is the generation's)."""
    return (
        known.accelerate_config == receipt.config_digest(generation)
        and known.mixed_precision == settings.mixed_precision
    )


def _record(
    settings: Settings,
    generation: Generation,
    commits: Commits | None,
    smoked: Verdict | None,
    trained: Verdict | None,
    steps: _Steps,
) -> Receipt:
    manifest = generation.manifest()
    assert manifest is not None  # built or found complete above
    default = accelerate_config.default_location()
    return Receipt(
        generation=generation.name,
        profile=settings.profile_name,
        lock=manifest.lock,
        python=manifest.python,
        interpreter=manifest.interpreter,
        distributions={name: d.version for name, d in manifest.inventory.distributions.items()},
        url=without_secret(settings.url),
        commits=commits,
        mixed_precision=settings.mixed_precision,
        accelerate_config=receipt.config_digest(generation),
        default_config_path=str(default),
        default_config=receipt.default_digest(default),
        smoke=smoked,
        train_step=trained,
        seconds=dict(steps.seconds),
        written=receipt.now(),
    )


def _without_times(record: Receipt) -> Receipt:
    return msgspec.structs.replace(record, seconds={}, written="")


def _summarize(
    settings: Settings,
    home: Installation,
    steps: _Steps,
    generation: Generation | None,
    record: Receipt | None,
) -> Report:
    trained = record.train_step if record else None
    active = generations.active(home)
    if generation and active and active != generation:
        say(f"      the new environment did not pass; {active.name} stays the active one")
    extra = {
        "home": str(home.root),
        "environment": str(home.venv) if active else None,
        "generation": active.name if active else None,
        "commits": record.commits if record else None,
        "profile": settings.profile_name,
        "device": trained.device if trained else None,
        "losses": trained.losses if trained else (),
        "kohya_trainer_ran": trained.kohya_trainer_ran if trained else False,
        "smoke": record.smoke if record else None,
        "train_step": trained,
        "seconds": steps.seconds,
        "config_file": str(generation.accelerate_config) if generation else None,
    }
    report = Report(f"Setup of {home.root}", tuple(steps.checks), extra)
    return msgspec.structs.replace(report, summary=_next(report, home, trained, generation))


def _next(
    report: Report, home: Installation, trained: Verdict | None, generation: Generation | None
) -> tuple[str, ...]:
    """What to type next."""
    if not report.ok:
        return (
            "",
            "Not finished. Mend what is named above, then run `invoke setup` again: it goes on from here.",
        )
    if trained is None:
        return ("", "Installed, not verified. `invoke verify` runs the smoke check and a training step.")
    config = generation.accelerate_config if generation else ""
    who = "kohya's trainer" if trained.kohya_trainer_ran else "the built-in step"
    return (
        "",
        f"LoRA training works here: {who} trained on {trained.device}.",
        "",
        f"checkout       {home.root}",
        f"environment    {home.venv}",
        f"configuration  {config}",
        "next           invoke new NAME --images DIR, then invoke train NAME",
        "               invoke status             (is everything still as it was installed?)",
    )
