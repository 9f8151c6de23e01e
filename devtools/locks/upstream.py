"""``nox -s upstream``: why upstream's own macOS requirements cannot be installed, and what replaces them.

The reasons are the resolver's own, as it gives them today. Once it has none, upstream has mended
its file, and this is how the project learns that it is no longer needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec
from packaging.specifiers import SpecifierSet

from devtools import posargs
from kohya_mps.core import settings as configuration
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.process import clean_environ
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import Settings
from kohya_mps.install import lockfile, package_index

from . import in_file, resolve, upstream_file
from .upstream_file import Line, Reader, Unreadable

#: The locks of this project's own tools; their packages replace nothing of upstream's.
_OWN_LOCKS = {"tools", "dev", "docs"}


class Kind(StrEnum):
    """What is wrong with a line."""

    CONFLICT = "excludes another"
    NO_WHEEL = "does not exist for a Mac"
    SOURCE_ONLY = "source only"
    NOT_REPRODUCIBLE = "not reproducible"
    CUDA_ONLY = "CUDA only"
    IMPORT_CONFLICT = "fails when imported"


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong with a line, and why."""

    kind: Kind
    why: str


class JudgedLine(Line, frozen=True, kw_only=True):
    """A line with its problems; ``ours`` is our pin and its lock, or why we have none."""

    ours: str
    problems: tuple[Problem, ...]


class Obstacle(msgspec.Struct, frozen=True):
    """Why the resolver found no solution, in its words, and the packages of the lines it names."""

    kind: Kind
    reason: str
    packages: tuple[str, ...]


class Explanation(msgspec.Struct, frozen=True):
    """Upstream's file of one commit: whether it resolves, and what replaces each line."""

    source: str
    mended: bool
    obstacles: tuple[Obstacle, ...]
    lines: tuple[JudgedLine, ...]


class ImportConflict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"with_": "with"}):
    """Two packages that resolve together and fail when they are imported."""

    package: str
    versions: str
    with_: str
    with_versions: str
    why: str

    def applies(self, package: str, versions: Mapping[str, str]) -> bool:
        """Whether a line's package meets the other one in these versions."""
        if package != self.package or not {package, self.with_} <= versions.keys():
            return False
        here = SpecifierSet(self.versions).contains(versions[package], prereleases=True)
        return here and SpecifierSet(self.with_versions).contains(versions[self.with_], prereleases=True)


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``config/upstream.yaml``: what the resolver cannot know of packages."""

    cuda_only: dict[str, str]
    unneeded: dict[str, str]
    source_only: dict[str, str]
    gui: tuple[str, ...]
    import_conflicts: tuple[ImportConflict, ...]

    def reason_to_leave_out(self, package: str) -> str | None:
        """Why this project does without a package; None when the file does not say."""
        if package in self.gui:
            return "the GUI's, which no trainer imports"
        reasons = (self.cuda_only, self.source_only, self.unneeded)
        return next((each[package] for each in reasons if package in each), None)


class UpstreamOptions(msgspec.Struct, frozen=True):
    """The one commit to look at; None for the pinned and the current one."""

    commit: str | None


def parse_options(arguments: Sequence[str]) -> UpstreamOptions:
    """The options of ``nox -s upstream``."""
    parser = posargs.parser("upstream", f"Explain why upstream's {upstream_file.NAME} cannot be installed.")
    parser.add_argument(
        "--commit", metavar="ID", help="of kohya_ss; without it, the pinned and the current one"
    )
    return UpstreamOptions(parser.parse_args(arguments).commit)


def run(settings: Settings, options: UpstreamOptions) -> Report:
    """Explain the file of the pinned commit, and upstream's current one where it can be read."""
    commit = options.commit or settings.commit
    known = configuration.read_yaml(configuration.CONFIG / "upstream.yaml", Known)
    read_pinned = upstream_file.reader(settings, commit)
    explanations = [explain(f"commit {commit[:12]}", read_pinned, settings, known)]
    checks: list[Check] = []
    if options.commit is None:
        read_current, name = upstream_file.remote_reader(settings.url, "HEAD"), "upstream's current file"
        try:
            same = list(upstream_file.lines(read_current)) == list(upstream_file.lines(read_pinned))
        except Unreadable as error:
            detail = f"{error}; only the file of {explanations[0].source} was looked at"
            checks.append(Check(name, Status.SKIP, detail))
        else:
            if same:
                checks.append(
                    Check(name, Status.PASS, f"asks for the same as that of {explanations[0].source}")
                )
            else:
                explanations.append(explain("upstream's current commit", read_current, settings, known))
    checks += [check for explanation in explanations for check in judge(explanation)]
    extra = {"upstream": explanations}
    return Report(f"Upstream's {upstream_file.NAME}", tuple(checks), extra, _summary(explanations[-1]))


def explain(source: str, read: Reader, settings: Settings, known: Known) -> Explanation:
    """Run the resolver on upstream's file, and judge each of its lines.

    Args:
        source: how the report names the file's commit.
        read: returns the file, and those that it includes.
        settings: whose profile's pins replace the lines.
        known: what the resolver cannot know.

    Raises:
        UsageError: the file cannot be read.
        StepFailed: the resolver failed without naming a line, as it does without a network.
    """
    say(f"  resolving {upstream_file.NAME} of {source} with uv")
    try:
        lines = list(upstream_file.lines(read))
    except Unreadable as error:
        raise UsageError(
            f"{upstream_file.NAME} of {source} cannot be read: {error}",
            "`invoke clone` brings the checkout that has it",
        ) from error
    obstacles, versions = _find_obstacles(lines)
    pins = _our_pins(settings)
    judged = tuple(
        JudgedLine(
            **msgspec.structs.asdict(line),
            ours=_replacement(line, pins, known),
            problems=tuple(_problems(line, obstacles, versions, known)),
        )
        for line in lines
    )
    mended = all(obstacle.kind is Kind.SOURCE_ONLY for obstacle in obstacles)
    return Explanation(source, mended, tuple(obstacles), judged)


def judge(explanation: Explanation) -> list[Check]:
    """The report's rows: whether the file resolves and why not, then each line."""
    name = f"{explanation.source} installs on Apple Silicon"
    if explanation.mended:
        detail = f"upstream has mended it: it resolves with Python {in_file.PYTHON}"
        rows = [Check(name, Status.PASS, detail)]
    else:
        rows = [
            Check(name, Status.WARN, f"{', '.join(obstacle.packages)}: {obstacle.reason}")
            for obstacle in explanation.obstacles
            if obstacle.kind is not Kind.SOURCE_ONLY
        ]
    for line in explanation.lines:
        problems = "".join(f"{problem.kind}: {problem.why}\n" for problem in line.problems)
        status = Status.WARN if problems else Status.PASS
        rows.append(Check(f"{line.file}:{line.number} {line.text}", status, f"{problems}ours: {line.ours}"))
    return rows


def _summary(last: Explanation) -> tuple[str, ...]:
    scope = "Only published packages count: what an index of nightlies has today, it may not have tomorrow."
    file = f"{last.source}: {upstream_file.NAME}"
    if last.mended:
        return (scope, f"{file} can be installed. Is this project still needed?")
    return (
        scope,
        f"{file} cannot be installed with Python {in_file.PYTHON}; the locks of this project replace it.",
    )


def _find_obstacles(lines: list[Line]) -> tuple[list[Obstacle], dict[str, str]]:
    """Resolve the lines; while there is no solution, note why, leave the named lines out and try again.

    Returns:
        The obstacles, and the versions of everything that is left in the end.
    """
    obstacles: list[Obstacle] = []
    remaining = {
        line.text: line.package
        for line in lines
        if (parsed := upstream_file.requirement(line.text)) is not None and not parsed.url
    }
    arguments = [upstream_file.NAME, *resolve.FOR_A_MAC]
    if any("--pre" in line.text.split() for line in lines):
        arguments += ["--prerelease", "allow"]
    environ = clean_environ(extra={**package_index.for_uv(), "MACOSX_DEPLOYMENT_TARGET": resolve.ANY_MACOS})
    with tempfile.TemporaryDirectory(prefix="kohya-mps-upstream-") as scratch:
        path = Path(scratch) / upstream_file.NAME
        while True:
            path.write_text("".join(f"{text}\n" for text in remaining), encoding="utf-8")
            resolution = resolve.resolve(arguments, cwd=path.parent, env=environ)
            if not resolution.reason:
                return obstacles, resolution.versions
            packages = resolve.required_packages(resolution.reason, remaining.values())
            if not packages:
                raise StepFailed(
                    f"uv's resolver gave no reason that names a line:\n{resolution.reason}",
                    "check the network; the index of packages has to be reachable",
                )
            obstacles.append(Obstacle(_kind(resolution.reason), resolution.reason, packages))
            remaining = {text: package for text, package in remaining.items() if package not in packages}


def _kind(reason: str) -> Kind:
    if resolve.is_source_only(reason):
        return Kind.SOURCE_ONLY
    return Kind.NO_WHEEL if resolve.is_absent(reason) else Kind.CONFLICT


def _problems(
    line: Line, obstacles: Iterable[Obstacle], versions: Mapping[str, str], known: Known
) -> Iterator[Problem]:
    for obstacle in obstacles:
        if line.package in obstacle.packages:
            yield Problem(obstacle.kind, _in_short(obstacle))
    for why in upstream_file.not_reproducible(line.text):
        yield Problem(Kind.NOT_REPRODUCIBLE, why)
    if why := known.cuda_only.get(line.package, ""):
        yield Problem(Kind.CUDA_ONLY, why)
    for pair in known.import_conflicts:
        if pair.applies(line.package, versions):
            yield Problem(Kind.IMPORT_CONFLICT, f"with {pair.with_} {versions[pair.with_]}: {pair.why}")


def _in_short(obstacle: Obstacle) -> str:
    """What excludes what; the resolver's whole reason has a row of its own."""
    if obstacle.kind is Kind.SOURCE_ONLY:
        return f"{resolve.culprit_chain(obstacle.reason)}, which would be built on the user's machine"
    return resolve.cause(obstacle.reason)


def _our_pins(settings: Settings) -> dict[str, str]:
    """What our locks install on a Mac, by package: the profile's lock first, the others for the rest."""
    found: dict[str, str] = {}
    for name in (settings.profile.lock, *(name for name in in_file.lock_names() if name not in _OWN_LOCKS)):
        lock = lockfile.read(configuration.CONSTRAINTS / f"{name}.txt")
        for package, version in lock.versions(lockfile.MAC_ARM64).items():
            found.setdefault(package, f"{package}=={version} ({lock.path.name})")
    return found


def _replacement(line: Line, pins: Mapping[str, str], known: Known) -> str:
    """What this project has in place of a line."""
    if pin := pins.get(line.package):
        return pin
    if not line.package:
        if line.text.startswith(("-e", "--editable")):
            return "the submodule of the checkout, at the commit that its gitlink names"
        return "left out"
    if (why := known.reason_to_leave_out(line.package)) is not None:
        return f"left out: {why}"
    return "left out, and config/upstream.yaml does not say why"
