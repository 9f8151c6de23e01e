"""Why upstream's ``requirements_macos_arm64.txt`` cannot be installed, and what takes its place.

The reasons are the resolver's own, asked today. Once it finds none, upstream has mended its
file, and this is how the project learns that it is no longer needed.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

import msgspec
import requests
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from devtools import posargs
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import capture, clean_environ
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.settings import Settings
from kohya_mps.install import lockfile, package_index

from . import make

FILE = "requirements_macos_arm64.txt"

_GITHUB = re.compile(r"(?:https://|ssh://git@|git@)github\.com[/:](?P<repository>[^/]+/[^/]+?)(?:\.git)?/?")
_GIT = re.compile(r"git\+(?P<url>[^#]*?)(?:(?<=[\w/])@(?P<revision>[^@/#]+))?/?(?:#(?P<fragment>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 20

#: Gives the text of a file of upstream; raises :class:`Unreadable`.
Reader = Callable[[str], str]


class Unreadable(Exception):
    """A file of upstream cannot be had, and why."""


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


class Line(msgspec.Struct, frozen=True):
    """One line of upstream's files, and what this project has instead.

    ``package`` is the canonical name, empty for an option; ``ours`` a pin and its lock, or
    why there is none.
    """

    file: str
    number: int
    text: str
    package: str
    ours: str
    problems: tuple[Problem, ...] = ()


class Obstacle(msgspec.Struct, frozen=True):
    """Why the resolver found no solution, in its words, and the packages of the lines it names."""

    kind: Kind
    reason: str
    packages: tuple[str, ...]


class Explanation(msgspec.Struct, frozen=True):
    """Upstream's file of one commit: whether it resolves, and what becomes of each line."""

    source: str
    mended: bool
    obstacles: tuple[Obstacle, ...]
    lines: tuple[Line, ...]


class Apart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"with_": "with"}):
    """Two packages that resolve together and fail when they are imported."""

    package: str
    versions: str
    with_: str
    with_versions: str
    why: str


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``config/upstream.yaml``: what the resolver cannot know of packages."""

    cuda_only: dict[str, str]
    unneeded: dict[str, str]
    source_only: dict[str, str]
    gui: tuple[str, ...]
    apart: tuple[Apart, ...]


class Options(msgspec.Struct, frozen=True):
    """What ``nox -s upstream`` was asked for: a commit instead of the pinned and the current one."""

    commit: str | None


def parse_options(arguments: Sequence[str]) -> Options:
    """The options of ``nox -s upstream``."""
    parser = posargs.parser("upstream", f"Explain why upstream's {FILE} cannot be installed.")
    parser.add_argument(
        "--commit", metavar="ID", help="of kohya_ss; without it, the pinned and the current one"
    )
    return Options(parser.parse_args(arguments).commit)


def run(chosen: Settings, options: Options) -> Report:
    """Explain the file of the pinned commit, and upstream's current one where it can be had."""
    commit = options.commit or chosen.commit
    known = settings.read_yaml(settings.CONFIG / "upstream.yaml", Known)
    pinned = _pinned(chosen, commit)
    found = [explain(f"commit {commit[:12]}", pinned, chosen, known)]
    checks: list[Check] = []
    if options.commit is None:
        now, name = _remote(chosen.url, "HEAD"), "upstream's current file"
        try:
            same = list(_lines(now, FILE)) == list(_lines(pinned, FILE))
        except Unreadable as error:
            used = f"{error}; only the file of {found[0].source} was looked at"
            checks.append(Check(name, Status.SKIP, used))
        else:
            if same:
                checks.append(Check(name, Status.PASS, f"asks for the same as that of {found[0].source}"))
            else:
                found.append(explain("upstream's current commit", now, chosen, known))
    rows = [check for explanation in found for check in judge(explanation)]
    return Report(f"Upstream's {FILE}", (*checks, *rows), {"upstream": found}, _summary(found[-1]))


def explain(source: str, read: Reader, chosen: Settings, known: Known) -> Explanation:
    """Ask the resolver about upstream's file, and judge each of its lines.

    Args:
        source: how the report names it.
        read: gives the file, and those that it includes.
        chosen: whose profile's pins replace the lines.
        known: what the resolver cannot know.

    Raises:
        UsageError: the file cannot be had.
        StepFailed: the resolver failed without naming a line, as it does without a network.
    """
    say(f"  asking uv's resolver about {FILE} of {source}")
    try:
        lines = list(_lines(read, FILE))
    except Unreadable as error:
        raise UsageError(
            f"{FILE} of {source} cannot be read: {error}", "`invoke clone` brings the checkout that has it"
        ) from error
    obstacles, versions = _ask(lines)
    ours = _pins(chosen)
    judged = tuple(_judge(line, obstacles, versions, ours, known) for line in lines)
    mended = all(obstacle.kind is Kind.SOURCE_ONLY for obstacle in obstacles)
    return Explanation(source, mended, tuple(obstacles), judged)


def judge(explanation: Explanation) -> list[Check]:
    """The report's rows: whether the file resolves and why not, then each line."""
    name = f"{explanation.source} installs on Apple Silicon"
    if explanation.mended:
        rows = [Check(name, Status.PASS, f"upstream has mended it: it resolves with Python {make.PYTHON}")]
    else:
        rows = [
            Check(name, Status.WARN, f"{', '.join(obstacle.packages)}: {obstacle.reason}")
            for obstacle in explanation.obstacles
            if obstacle.kind is not Kind.SOURCE_ONLY
        ]
    for line in explanation.lines:
        wrong = "".join(f"{problem.kind}: {problem.why}\n" for problem in line.problems)
        status = Status.WARN if wrong else Status.PASS
        rows.append(Check(f"{line.file}:{line.number} {line.text}", status, f"{wrong}ours: {line.ours}"))
    return rows


def _summary(last: Explanation) -> tuple[str, ...]:
    asked = "Only published packages were asked for: what an index of nightlies has today, it may not have tomorrow."
    if last.mended:
        return (asked, f"{last.source}: {FILE} can be installed. Is this project still needed?")
    instead = "the locks of this project take its place"
    return (asked, f"{last.source}: {FILE} cannot be installed with Python {make.PYTHON}; {instead}.")


def _pinned(chosen: Settings, commit: str) -> Reader:
    """The commit in the user's checkout; where that has not got it, upstream's."""
    root = Installation(chosen.home).root
    inside = capture(["git", "-C", root, "cat-file", "-e", f"{commit}:{FILE}"]) if root.is_dir() else None
    return _git(root, commit) if inside and inside.returncode == 0 else _remote(chosen.url, commit)


def _git(repository: Path, commit: str) -> Reader:
    def read(name: str) -> str:
        shown = capture(["git", "-C", repository, "show", f"{commit}:{name}"])
        if shown.returncode:
            raise Unreadable(shown.stderr.strip())
        return shown.stdout

    return read


def _remote(url: str, commit: str) -> Reader:
    """Single files of a repository that is a local path, or is on GitHub."""
    if Path(url).is_dir():
        return _git(Path(url), commit)
    on_github = _GITHUB.fullmatch(url)

    def read(name: str) -> str:
        if not on_github:
            raise Unreadable(f"{url} is neither on GitHub nor a local path")
        address = f"https://raw.githubusercontent.com/{on_github['repository']}/{commit}/{name}"
        try:
            answer = requests.get(address, timeout=_TIMEOUT_SECONDS)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise Unreadable(f"{address} cannot be fetched ({type(error).__name__})") from error
        return answer.text

    return read


def _lines(read: Reader, name: str, seen: tuple[str, ...] = ()) -> Iterator[Line]:
    """Every line of a file that means something, with those of the files that it includes."""
    for number, raw in enumerate(read(name).splitlines(), 1):
        text = re.sub(r"(^|\s)#.*", "", raw).strip()
        included = re.fullmatch(r"(?:-r|--requirement)[\s=]*(\S+)", text)
        if included and included[1] not in (name, *seen):
            yield from _lines(read, included[1], (name, *seen))
        elif text:
            yield Line(name, number, text, _package(text), "")


def _package(text: str) -> str:
    if (requirement := _requirement(text)) is not None:
        return canonicalize_name(requirement.name)
    if from_git := _GIT.fullmatch(text):
        return canonicalize_name(Path(from_git["url"].rstrip("/")).stem)
    return ""


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _ask(lines: list[Line]) -> tuple[list[Obstacle], dict[str, str]]:
    """Ask for a solution; while there is none, note why, put the named lines aside and ask again.

    Returns:
        What stood in the way, and the versions of everything that is left then.
    """
    obstacles: list[Obstacle] = []
    asked = {
        line.text: line.package
        for line in lines
        if (requirement := _requirement(line.text)) is not None and not requirement.url
    }
    pre = any("--pre" in line.text.split() for line in lines)
    with tempfile.TemporaryDirectory(prefix="kohya-mps-upstream-") as scratch:
        environ = clean_environ(extra={**package_index.for_uv(), "MACOSX_DEPLOYMENT_TARGET": make.ANY_MACOS})
        arguments = [FILE, "--python-platform", "aarch64-apple-darwin"]
        arguments += ["--prerelease", "allow"] if pre else []
        while True:
            (Path(scratch) / FILE).write_text("".join(f"{text}\n" for text in asked), encoding="utf-8")
            resolution = make.resolve(arguments, cwd=Path(scratch), env=environ)
            if not resolution.reason:
                return obstacles, resolution.versions
            packages = _named(resolution.reason, asked.values())
            if not packages:
                raise StepFailed(
                    f"uv's resolver gave no reason that names a line:\n{resolution.reason}",
                    "check the network; the index of packages has to be reachable",
                )
            obstacles.append(Obstacle(_kind(resolution.reason), resolution.reason, packages))
            asked = {text: package for text, package in asked.items() if package not in packages}


def _named(reason: str, asked: Iterable[str]) -> tuple[str, ...]:
    """The packages that the resolver says the file requires: those whose lines cannot stay."""
    if "the network was disabled" in reason:
        return ()  # what is not in the cache may well exist
    required = " and ".join(re.findall(r"you require (.*?), we can conclude", reason, re.DOTALL))
    words = {canonicalize_name(word) for word in re.findall(r"(?:^| and )([\w.-]+)", required)}
    return tuple(sorted(words & set(asked)))


def _kind(reason: str) -> Kind:
    if "building from source is disabled" in reason:
        return Kind.SOURCE_ONLY
    if any(words in reason for words in ("has no wheels", "was not found", "there is no version of")):
        return Kind.NO_WHEEL
    return Kind.CONFLICT


def _judge(
    line: Line,
    obstacles: Iterable[Obstacle],
    versions: Mapping[str, str],
    ours: Mapping[str, str],
    known: Known,
) -> Line:
    problems = [
        Problem(obstacle.kind, _in_short(obstacle))
        for obstacle in obstacles
        if line.package in obstacle.packages
    ]
    problems += [Problem(Kind.NOT_REPRODUCIBLE, why) for why in _moving(line.text)]
    if why := known.cuda_only.get(line.package):
        problems.append(Problem(Kind.CUDA_ONLY, why))
    for pair in known.apart:
        here, there = versions.get(line.package), versions.get(pair.with_)
        if (
            line.package == pair.package
            and here is not None
            and there is not None
            and SpecifierSet(pair.versions).contains(here, prereleases=True)
            and SpecifierSet(pair.with_versions).contains(there, prereleases=True)
        ):
            problems.append(Problem(Kind.IMPORT_CONFLICT, f"with {pair.with_} {there}: {pair.why}"))
    return msgspec.structs.replace(line, problems=tuple(problems), ours=_instead(line, ours, known))


def _in_short(obstacle: Obstacle) -> str:
    """What excludes what; the resolver's whole reason stands in a row of its own."""
    if obstacle.kind is Kind.SOURCE_ONLY:
        return f"{make.culprit_chain(obstacle.reason)}, which would be built on the user's machine"
    sentence = obstacle.reason.partition("cause:")[2].split(", we can conclude")[0]
    return " ".join(sentence.split()).removeprefix("Because ")


def _moving(text: str) -> Iterator[str]:
    """Why a line means something else tomorrow."""
    words = shlex.split(text) if text.startswith("-") else []
    for option, value in pairwise([*words, ""]):
        if option == "--pre":
            yield "--pre takes the newest pre-release of the day"
        elif option in ("--extra-index-url", "--index-url", "-i", "--find-links", "-f"):
            changing = (
                "an index of nightlies, which come and go" if "nightly" in value else "an index of its own"
            )
            yield f"{option}: {changing}"
    requirement = _requirement(text)
    if from_git := _GIT.fullmatch(requirement.url if requirement and requirement.url else text):
        revision, fragment = from_git["revision"], from_git["fragment"]
        if revision is None:
            only = f": #{fragment} is a URL fragment, which git ignores" if fragment else ""
            yield f"builds what is HEAD that day{only}"
        elif not _COMMIT.fullmatch(revision):
            yield f"{revision} is a branch or a tag, which can move"
    elif requirement is not None:
        exact = [s for s in requirement.specifier if s.operator == "==" and not s.version.endswith(".*")]
        if not exact:
            yield "does not name one version"


def _pins(chosen: Settings) -> dict[str, str]:
    """What our locks have on a Mac, by package: the profile's first, the others' where it has none."""
    found: dict[str, str] = {}
    developers = {"tools", "dev"}
    for name in (chosen.profile.lock, *(name for name in make.names() if name not in developers)):
        lock = lockfile.read(settings.CONSTRAINTS / f"{name}.txt")
        for package, version in lock.versions(lockfile.MAC_ARM64).items():
            found.setdefault(package, f"{package}=={version} ({lock.path.name})")
    return found


def _instead(line: Line, ours: Mapping[str, str], known: Known) -> str:
    package = line.package
    if pin := ours.get(package):
        return pin
    if not package:
        if line.text.startswith(("-e", "--editable")):
            return "the submodule of the checkout, at the commit that its gitlink names"
        return "left out"
    for reasons in (known.cuda_only, known.source_only, known.unneeded):
        if package in reasons:
            return f"left out: {reasons[package]}"
    if package in known.gui:
        return "left out: the GUI's, which no trainer imports"
    return "left out, and config/upstream.yaml does not say why"
