"""Rehearse every combination that people use, and write the table that they can look them up in.

It can be interrupted: what was rehearsed is found again as long as neither the training, the
environment, the operator data nor the simulation has changed.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from devtools import posargs, sandbox
from kohya_mps.core import settings
from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.run_lock import exclusive_lock
from kohya_mps.core.settings import PROBES, Settings, profile_names
from kohya_mps.install import lockfile

from . import operators, runner, table, verdict
from .record import Record
from .request import Request
from .runner import Stage, Training, Trainings
from .table import Outcomes

OUTCOMES = operators.DATA / "outcomes.json"
_PLAIN = ("lora", "AdamW")
# Distributions whose versions decide what a training does.
_TELLING = ("torch", "accelerate", "diffusers", "transformers", "lycoris-lora")


class MatrixOptions(msgspec.Struct, frozen=True):
    """What ``nox -s rehearse_matrix`` was asked for; ``only`` is a part of a training's name."""

    profiles: tuple[str, ...]
    families: tuple[str, ...]
    jobs: int
    only: str = ""
    thorough: bool = False


def parse_options(arguments: Sequence[str]) -> MatrixOptions:
    """The options of ``nox -s rehearse_matrix``."""
    families = tuple(runner.trainings().trainers)
    parser = posargs.parser(
        "rehearse_matrix",
        "Rehearse all networks, optimizers and options; an interrupted run goes on where it was.",
    )
    parser.add_argument(
        "--profile", action="append", choices=tuple(profile_names()), help="all of them if left out"
    )
    parser.add_argument("--family", action="append", choices=families, help="all of them if left out")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="trainings whose name has this in it; no table"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="trainings at a time; as memory allows if left out"
    )
    parser.add_argument(
        "--thorough", action="store_true", help="every network with every optimizer, not each once"
    )
    given = parser.parse_args(arguments)
    return MatrixOptions(
        tuple(given.profile or profile_names()),
        tuple(given.family or families),
        given.jobs or runner.most_jobs(),
        given.only,
        given.thorough,
    )


def combinations(known: Trainings, family: str, *, thorough: bool) -> list[Training]:
    """Networks with optimizers: every one with every other, or each with the plainest other."""
    network, optimizer = _PLAIN
    return [
        Training(table.pair(one, other), family, (*known.networks[one], *known.optimizers[other]))
        for one in known.networks
        for other in known.optimizers
        if thorough or one == network or other == optimizer
    ]


def options(known: Trainings, family: str) -> list[Training]:
    """Each option on its own, with the plainest network and optimizer."""
    network, optimizer = _PLAIN
    plain = (*known.networks[network], *known.optimizers[optimizer])
    return [Training(name, family, (*plain, *arguments)) for name, arguments in known.options.items()]


def rehearse(wanted: MatrixOptions) -> Report:
    """Rehearse what is not rehearsed yet; write the outcomes and the table when that was everything."""
    checks = []
    done: list[Outcomes] = []
    for profile in wanted.profiles:
        chosen = settings.load(profile=profile)
        with exclusive_lock(Installation(sandbox.SANDBOX)):
            stage = runner.prepare(chosen, builtin=False)
            for family in wanted.families:
                done.append(rehearse_family(stage, chosen, family, wanted))
                checks.append(_check(done[-1]))
    if not wanted.only:
        outcomes = _merged(done)
        write_atomic(OUTCOMES, msgspec.json.format(msgspec.json.encode(outcomes), indent=1) + b"\n")
        write_atomic(table.PATH, table.render(outcomes).encode())
        say(f"  wrote {table.PATH}")
    return Report(
        "Rehearsals (predicted)", tuple(checks), {"outcomes": done, "limits": verdict.LIMITS}, verdict.LIMITS
    )


def rehearse_family(stage: Stage, chosen: Settings, family: str, wanted: MatrixOptions) -> Outcomes:
    """Run what has no record yet, and boil all records down."""
    code = _code_digest()
    known = runner.trainings()
    both = [
        [one for one in group if wanted.only in one.name]
        for group in (combinations(known, family, thorough=wanted.thorough), options(known, family))
    ]
    everything = [one for group in both for one in group]
    places = {one.name: _place(stage, one, code) for one in everything}
    pending: list[Request] = []
    for one in reversed(everything):  # what an interrupted run has by then: the options say more
        if not all((places[one.name] / device / "record.json").exists() for device in ("mps", "cpu")):
            pending += runner.requests(stage, one, places[one.name], fallback=False)
    say(f"  {family}: {len(everything)} trainings, {len(pending) // 2} of them to be rehearsed")
    with memory_shared(wanted.jobs):
        runner.run(stage, pending, wanted.jobs)
    cells = [
        tuple(
            table.cell(one.name, _record(places[one.name], "mps"), _record(places[one.name], "cpu"))
            for one in group
        )
        for group in both
    ]
    for place in places.values():
        _tidy(place)
    versions = lockfile.read(chosen.profile.lock_file).versions(lockfile.LINUX_X86_64)
    telling = {name: versions[name] for name in _TELLING}
    return Outcomes(chosen.profile_name, family, _today(), telling, *cells)


@contextlib.contextmanager
def memory_shared(jobs: int) -> Iterator[None]:
    """Let no training take more than its share of the memory: that one fails, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    share = psutil.virtual_memory().available // jobs
    resource.setrlimit(resource.RLIMIT_DATA, (share, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _place(stage: Stage, training: Training, code: str) -> Path:
    what = "\0".join((code, training.family, training.name, *training.arguments))
    return stage.work / "matrix" / hashlib.sha256(what.encode()).hexdigest()[:16]


def _record(place: Path, device: str) -> Record:
    path, log = place / device / "record.json", place / device / "trainer.log"
    return runner.result(Request("", device, "", (), False, False, str(path), str(log)))


def _tidy(place: Path) -> None:
    """Only the records and the logs are kept: the trained weights and caches are large."""
    for entry in place.glob("*/*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.suffix not in (".json", ".log"):
            entry.unlink()


def _code_digest() -> str:
    """Changes with everything of ours that an outcome depends on."""
    here = Path(__file__).parent
    files = [
        *sorted(here.glob("simulation/*.py")),
        *(here / name for name in ("record.py", "operators.py", "runner.py")),
        *(PROBES / name for name in ("make_model.py", "small_trainer.py")),
    ]
    content = b"".join(path.read_bytes() for path in (*files, *sorted(operators.DATA.glob("torch-*.json"))))
    return hashlib.sha256(content).hexdigest()


def _merged(new: list[Outcomes]) -> list[Outcomes]:
    """The new outcomes, and the old ones of other profiles and families."""
    old = table.load(OUTCOMES) if OUTCOMES.exists() else []
    fresh = {(one.profile, one.family) for one in new}
    kept = [one for one in old if (one.profile, one.family) not in fresh and one.profile in profile_names()]
    return sorted([*kept, *new], key=lambda one: (one.profile, one.family))


def _check(outcomes: Outcomes) -> Check:
    count = sum(cell.trains for cell in outcomes.cells)
    known = runner.trainings().options
    apart = []
    for cell in outcomes.cells:
        training = Training(cell.name, outcomes.family, known.get(cell.name, ()))
        if (cell.apart or 0) > verdict.tolerance(runner.precision(training, otherwise="no")):
            apart.append(cell.name)
    detail = f"{count} of {len(outcomes.cells)} train"
    if apart:
        detail += f"; losses are not the CPU's: {', '.join(apart)}"
    return Check(f"{outcomes.profile}, {outcomes.family}", Status.WARN if apart else Status.PASS, detail)


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
