"""``invoke setup`` and ``invoke verify``: the steps in their order, each reported with its time.

A step that does not depend on a failed one still runs: where the repository cannot be
reached, everything else is done, and the next run does only what is left.
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
    """What ``invoke setup`` does beyond what the settings say.

    ``gui`` is whether kohya's web page is installed; with None it stays as it is.
    """

    smoke: bool = True
    train_step: bool = True
    stash: bool = False
    replace_default: bool = False
    replace_venv: bool = False
    gui: bool | None = None

    def with_gui(self, gui: bool, no_gui: bool) -> SetupOptions:
        """The same options, with ``--gui`` or ``--no-gui`` applied.

        Raises:
            UsageError: both are set.
        """
        if gui and no_gui:
            raise UsageError("--gui and --no-gui exclude each other", "use one of them")
        return msgspec.structs.replace(self, gui=gui) if gui or no_gui else self


class _Steps:
    """The rows of the report, made by running steps; a failed step is a row, not the end."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.checks: list[Check] = []
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Callable[[Status, str, str], None]]:
        """Run the block as a step. It gets a function to report its status, detail and fix with."""
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
        """Add a row for a step that does not run."""
        say(f"[{len(self.checks) + 1}/{self.total}] {name}\n      skip: {why}")
        self.checks.append(Check(name, Status.SKIP, why))


def setup(settings: Settings, options: SetupOptions) -> Report:
    """Bring the installation to what the settings say, from whatever state it is in.

    Raises:
        UsageError: the home or the settings are invalid.
        Busy: another run holds this installation.
    """
    home = Installation(settings.home)
    check_location(home)
    accelerate_config.check_precision(settings)
    if not home.state.exists():
        # No other run can be at work, and a machine that is refused is left as it was.
        machine = check_machine(settings, environment.plan(settings, gui=options.gui))
        if machine.status is Status.FAIL:
            return _refusal(home, (machine,))
    with exclusive_lock(home):
        # Only now: what is planned for must not be replaced by another run before it is used.
        return _set_up(settings, options, home, environment.plan(settings, gui=options.gui))


def _refusal(home: Installation, checks: tuple[Check, ...]) -> Report:
    return Report("Setup", checks, {"home": str(home.root), "device": None})


def _set_up(settings: Settings, options: SetupOptions, home: Installation, plan: Plan) -> Report:
    steps = _Steps(total=6)
    if not _prepare(settings, options, steps, plan):
        return _refusal(home, tuple(steps.checks))
    commits = _check_out(settings, options, steps)
    generation = _build(settings, steps, plan)
    if generation is None:
        for name in ("configuration", "smoke check", "training step"):
            steps.skip(name, "there is no environment")
        return _summarize(settings, home, steps, None, None)
    with steps.step("configuration") as report:
        configured = accelerate_config.configure(
            settings, generation, replace_default=options.replace_default
        )
        row = max(configured.checks, key=lambda check: check.status is not Status.PASS)
        report(row.status, row.detail, row.fix)
    known = receipt.read(generation)
    same = known is not None and _same_inputs(generation, known)
    smoke = _smoke_check(settings, options, steps, generation, _Earlier(known.smoke if known else None, same))
    if smoke is None or smoke.ok or generations.active(home) is None:
        generations.activate(home, generation)
    same = same and known is not None and known.commits == commits
    earlier = _Earlier(known.train_step if known else None, same)
    trained = _training_step(settings, options, steps, generation, commits, earlier)
    record = _record(settings, generation, commits, smoke, trained, steps)
    if known is None or _without_times(known) != _without_times(record):
        receipt.save(generation, record)
    generations.prune(home, settings.generations_kept)
    return _summarize(settings, home, steps, generation, record)


def _prepare(settings: Settings, options: SetupOptions, steps: _Steps, plan: Plan) -> bool:
    """Check the machine, and move an environment of somebody else's aside; whether set-up can go on."""
    with steps.step("machine") as report:
        machine = check_machine(settings, plan)
        report(machine.status, machine.detail, machine.fix)
        if machine.status is not Status.FAIL:
            generations.set_aside_foreign_venv(Installation(settings.home), replace=options.replace_venv)
    return steps.checks[-1].status is not Status.FAIL


def _check_out(settings: Settings, options: SetupOptions, steps: _Steps) -> Commits | None:
    """Check out the pinned commits; None when that failed."""
    commits: Commits | None = None
    with steps.step("checkout") as report:
        before = checkout.present(Installation(settings.home))
        commits = checkout.ensure_checkout(settings, stash=options.stash)
        how = "in place" if commits == before else "checked out"
        report(Status.PASS, f"kohya_ss {commits.kohya_ss[:12]} {how}", "")
    return commits


def _build(settings: Settings, steps: _Steps, plan: Plan) -> Generation | None:
    """Build the environment that is planned; None when that failed."""
    generation: Generation | None = None
    with steps.step("environment") as report:
        generation = environment.build(settings, plan)
        how = "in place" if generation == plan.usable else "built"
        detail = f"{generation.name} {how}: {len(plan.lock.pins)} pins of {plan.lock.path.name}"
        report(Status.PASS, detail, "")
    return generation


class _Earlier(msgspec.Struct, frozen=True):
    """The verdict in the receipt, and whether it was given on the configuration of today."""

    verdict: Verdict | None
    same_inputs: bool


def _smoke_check(
    settings: Settings, options: SetupOptions, steps: _Steps, generation: Generation, earlier: _Earlier
) -> Verdict | None:
    return _verify_once(
        steps,
        "smoke check",
        options.smoke,
        earlier,
        lambda: smoke_check.run(settings, generation),
        lambda verdict: f"{len(verdict.checks)} checks on {verdict.device}",
    )


def _training_step(
    settings: Settings,
    options: SetupOptions,
    steps: _Steps,
    generation: Generation,
    commits: Commits | None,
    earlier: _Earlier,
) -> Verdict | None:
    def describe(verdict: Verdict) -> str:
        losses = ", ".join(f"{loss:.4f}" for loss in verdict.losses)
        return f"on {verdict.device}, {verdict.what}; losses {losses}"

    home = Installation(settings.home)
    training = training_step.TrainingStepOptions(builtin=commits is None)
    return _verify_once(
        steps,
        "training step",
        options.train_step and options.smoke,
        earlier,
        lambda: training_step.run(settings, generation, home.root, home.verification, training),
        describe,
    )


def _verify_once(
    steps: _Steps,
    name: str,
    requested: bool,
    earlier: _Earlier,
    run: Callable[[], Report],
    describe: Callable[[Verdict], str],
) -> Verdict | None:
    """Run a verification as a step, unless an earlier verdict still holds.

    Args:
        steps: the rows of the report.
        name: of the step.
        requested: whether the person wants it.
        earlier: what the receipt says.
        run: runs the verification.
        describe: the detail of the row of a verification that passed.

    Returns:
        The verdict that holds now; None when there is none.
    """
    if not requested:
        steps.skip(name, "not requested")
        return earlier.verdict
    before = earlier.verdict
    if before and before.ok and earlier.same_inputs:
        steps.skip(name, f"passed on {before.device} at {before.at}; `invoke verify` runs it again")
        return before
    verdict: Verdict | None = None
    with steps.step(name) as report:
        verdict = receipt.verdict(run())
        failed = [check for check in verdict.checks if check.status is Status.FAIL]
        if failed:
            detail = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            report(Status.FAIL, detail, failed[0].fix)
        else:
            report(Status.PASS, describe(verdict), "")
    return verdict


def verify(settings: Settings, *, full: bool = False) -> Report:
    """Run the smoke check and the training step on what is installed, and record the verdicts.

    Args:
        settings: the home and the profile.
        full: train a model of Stable Diffusion 1.5's full size.
    """
    home = Installation(settings.home)
    with _locked_generation(home, settings.profile_name) as generation:
        smoke = smoke_check.run(settings, generation)
        commits = checkout.present(home)
        options = training_step.TrainingStepOptions(
            full=full and commits is not None, builtin=commits is None
        )
        trained = training_step.run(settings, generation, home.root, home.verification, options)
        if known := receipt.read(generation):
            verdicts = {"smoke": receipt.verdict(smoke), "train_step": receipt.verdict(trained)}
            receipt.save(generation, msgspec.structs.replace(known, written=receipt.now(), **verdicts))
    extra = {**trained.extra, "smoke": smoke.checks, "train_step": trained.checks}
    return Report(f"Verification of {home.root}", (*smoke.checks, *trained.checks), extra)


def configure(settings: Settings, replace_default: bool, layout: ProcessLayout | None = None) -> Report:
    """``invoke configure``: write the configuration again; verdicts on another one no longer hold.

    Args:
        settings: the mixed precision.
        replace_default: back up somebody else's default configuration and replace it.
        layout: how trainings are distributed; with None that stays as it is.
    """
    home = Installation(settings.home)
    with _locked_generation(home, settings.profile_name) as generation:
        report = accelerate_config.configure(settings, generation, replace_default=replace_default)
        if layout:
            report = report.plus([accelerate_config.configure_distributed(settings, generation, layout)])
        known = receipt.read(generation)
        if known and (changed := _reconfigured(settings, generation, known)) != known:
            receipt.save(generation, changed)
    return report


@contextlib.contextmanager
def _locked_generation(home: Installation, profile: str) -> Iterator[Generation]:
    """Hold the installation, with the generation that is active then."""
    generations.installed(home, profile)  # refused before a lock file is made
    with exclusive_lock(home):
        yield generations.installed(home, profile)  # again: another run may have activated one meanwhile


def _reconfigured(settings: Settings, generation: Generation, known: Receipt) -> Receipt:
    same = _same_inputs(generation, known)
    return msgspec.structs.replace(
        known,
        mixed_precision=settings.mixed_precision,
        accelerate_config=receipt.config_digest(generation),
        default_config=receipt.default_digest(accelerate_config.default_location()),
        default_config_path=str(accelerate_config.default_location()),
        smoke=known.smoke if same else None,
        train_step=known.train_step if same else None,
    )


def check_machine(settings: Settings, plan: Plan) -> Check:
    """Whether the machine has what set-up needs: architecture, git, and for a build Python and disk."""
    try:
        _check_architecture()
        version = _git_version()
        if plan.usable is None:
            environment.find_python(settings.profile)
            if plan.changed is None:
                environment.check_disk(Installation(settings.home), settings.profile)
    except KohyaError as error:
        return Check("machine", Status.FAIL, error.what, error.fix)
    found = f"{platform.system()} {platform.machine()}, {version}, expected device {expected_device()}"
    return Check("machine", Status.PASS, found)


def _check_architecture() -> None:
    machine, expected = platform.machine(), expected_architecture()
    if machine == expected:
        return
    if on_mac():
        raise UsageError(
            f"architecture {machine}, not {expected}: this Python runs under Rosetta, or this is an Intel Mac",
            "install a native arm64 Python 3.11 and make .venv again",
        )
    raise UsageError(
        f"architecture {machine}, not {expected}: there are no wheels for it", "use an x86-64 machine"
    )


def _git_version() -> str:
    fix = "`xcode-select --install`" if on_mac() else "install git with your package manager"
    try:
        done = capture(["git", "--version"])
    except StepFailed as error:
        raise UsageError("git was not found", fix) from error
    if done.returncode:
        raise UsageError("git does not run", fix)
    return done.stdout.strip()


def _same_inputs(generation: Generation, known: Receipt) -> bool:
    """Whether an earlier verdict was given on this configuration (the lock is the generation's)."""
    return known.accelerate_config == receipt.config_digest(generation)


def _record(
    settings: Settings,
    generation: Generation,
    commits: Commits | None,
    smoke: Verdict | None,
    trained: Verdict | None,
    steps: _Steps,
) -> Receipt:
    manifest = generation.manifest()
    assert manifest is not None  # it was built, or found complete
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
        smoke=smoke,
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
            "Not finished. Fix what is named above, then run `invoke setup` again: it goes on from here.",
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
