"""``nox -s rehearse_matrix``: rehearse every combination that people use, and write the table of them.

It can be interrupted: the next run uses the records of this one as long as the training, the
environment, the operator data and the simulation are the same.
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

from . import operators, runner, support_page, verdict
from .record import Record
from .request import Request
from .runner import Stage, Training, Trainings
from .support_page import Outcomes

OUTCOMES = operators.DATA / "outcomes.json"
_PLAIN = ("lora", "AdamW")
# Packages whose versions decide what a training does.
_DECISIVE = ("torch", "accelerate", "diffusers", "transformers", "lycoris-lora")


class MatrixOptions(msgspec.Struct, frozen=True):
    """What is rehearsed, ``jobs`` trainings at a time; ``only`` is a part of a training's name."""

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
    parsed = parser.parse_args(arguments)
    return MatrixOptions(
        tuple(parsed.profile or profile_names()),
        tuple(parsed.family or families),
        parsed.jobs or runner.most_jobs(),
        parsed.only,
        parsed.thorough,
    )


def combinations(known: Trainings, family: str, *, thorough: bool) -> list[Training]:
    """Networks with optimizers: each with each, or each with the plainest one of the others."""
    network, optimizer = _PLAIN
    return [
        Training(support_page.pair(this, that), family, (*known.networks[this], *known.optimizers[that]))
        for this in known.networks
        for that in known.optimizers
        if thorough or this == network or that == optimizer
    ]


def option_trainings(known: Trainings, family: str) -> list[Training]:
    """Each option on its own, with the plainest network and optimizer."""
    network, optimizer = _PLAIN
    plain = (*known.networks[network], *known.optimizers[optimizer])
    return [Training(name, family, (*plain, *arguments)) for name, arguments in known.options.items()]


def rehearse(options: MatrixOptions) -> Report:
    """Rehearse what has no record yet; write the outcomes and the table unless ``only`` limits them."""
    checks = []
    rehearsed: list[Outcomes] = []
    for profile in options.profiles:
        chosen = settings.load(profile=profile)
        with exclusive_lock(Installation(sandbox.SANDBOX)):
            stage = runner.prepare(chosen, builtin=False)
            for family in options.families:
                rehearsed.append(rehearse_family(stage, chosen, family, options))
                checks.append(judge(rehearsed[-1]))
    if not options.only:
        outcomes = merged(support_page.load(OUTCOMES) if OUTCOMES.exists() else [], rehearsed)
        write_atomic(OUTCOMES, msgspec.json.format(msgspec.json.encode(outcomes), indent=1) + b"\n")
        write_atomic(support_page.PATH, support_page.render(outcomes).encode())
        say(f"  wrote {support_page.PATH}")
    extra = {"outcomes": rehearsed, "limits": verdict.LIMITS}
    return Report("Rehearsals (predicted)", tuple(checks), extra, verdict.LIMITS)


def rehearse_family(stage: Stage, chosen: Settings, family: str, options: MatrixOptions) -> Outcomes:
    """Run the trainings of a family that have no record yet, and summarize all records."""
    code = _code_digest()
    known = runner.trainings()
    groups = [
        [training for training in group if options.only in training.name]
        for group in (
            combinations(known, family, thorough=options.thorough),
            option_trainings(known, family),
        )
    ]
    everything = [training for group in groups for training in group]
    directories = {training.name: _directory(stage, training, code) for training in everything}
    pending: list[Request] = []
    # The options come first: where it is interrupted, they say more.
    for training in reversed(everything):
        directory = directories[training.name]
        if not all((directory / device / "record.json").exists() for device in ("mps", "cpu")):
            pending += runner.requests(stage, training, directory, fallback=False)
    say(f"  {family}: {len(everything)} trainings, {len(pending) // 2} of them to be rehearsed")
    with memory_shared(options.jobs):
        runner.run(stage, pending, options.jobs)
    cells = [tuple(_cell(training.name, directories[training.name]) for training in each) for each in groups]
    for directory in directories.values():
        remove_large_files(directory)
    versions = lockfile.read(chosen.profile.lock_file).versions(lockfile.LINUX_X86_64)
    decisive = {name: versions[name] for name in _DECISIVE}
    return Outcomes(chosen.profile_name, family, _today(), decisive, *cells)


@contextlib.contextmanager
def memory_shared(jobs: int) -> Iterator[None]:
    """Limit each training to its share of the memory: one that needs more fails, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    share = psutil.virtual_memory().available // jobs
    resource.setrlimit(resource.RLIMIT_DATA, (share, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _directory(stage: Stage, training: Training, code: str) -> Path:
    identity = "\0".join((code, training.family, training.name, *training.arguments))
    return stage.work / "matrix" / hashlib.sha256(identity.encode()).hexdigest()[:16]


def _cell(name: str, directory: Path) -> support_page.Cell:
    return support_page.cell(name, _record(directory, "mps"), _record(directory, "cpu"))


def _record(directory: Path, device: str) -> Record:
    path, log = directory / device / "record.json", directory / device / "trainer.log"
    return runner.result(Request("", device, "", (), False, False, str(path), str(log)))


def remove_large_files(directory: Path) -> None:
    """Keep only the records and the logs of a training; its weights and caches are large."""
    for entry in directory.glob("*/*"):
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.suffix not in (".json", ".log"):
            entry.unlink()


def _code_digest() -> str:
    """A digest of everything in this repository that an outcome depends on."""
    here = Path(__file__).parent
    files = [
        *sorted(here.glob("simulation/*.py")),
        *(here / name for name in ("record.py", "operators.py", "runner.py")),
        *(PROBES / name for name in ("make_model.py", "small_trainer.py")),
    ]
    content = b"".join(path.read_bytes() for path in (*files, *sorted(operators.DATA.glob("torch-*.json"))))
    return hashlib.sha256(content).hexdigest()


def merged(old: list[Outcomes], new: list[Outcomes]) -> list[Outcomes]:
    """The new outcomes, and the old ones of other families and of other profiles that still exist."""
    replaced = {(each.profile, each.family) for each in new}
    kept = [o for o in old if (o.profile, o.family) not in replaced and o.profile in profile_names()]
    return sorted([*kept, *new], key=lambda outcomes: (outcomes.profile, outcomes.family))


def judge(outcomes: Outcomes) -> Check:
    """How many trainings came to their end, and whether some have other losses than on the CPU."""
    known = runner.trainings().options
    different = []
    for cell in outcomes.cells:
        training = Training(cell.name, outcomes.family, known.get(cell.name, ()))
        allowed = verdict.tolerance(runner.precision(training, otherwise="no"))
        if (cell.loss_difference or 0) > allowed:
            different.append(cell.name)
    detail = f"{sum(cell.trains for cell in outcomes.cells)} of {len(outcomes.cells)} train"
    if different:
        detail += f"; losses are not the CPU's: {', '.join(different)}"
    status = Status.WARN if different else Status.PASS
    return Check(f"{outcomes.profile}, {outcomes.family}", status, detail)


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()
