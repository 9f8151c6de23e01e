"""``invoke explain``: the known failures in a log or traceback, of any size, in constant memory."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from kohya_mps.core.errors import UsageError
from kohya_mps.core.machine import expected_device
from kohya_mps.core.report import Check, Report, Status, say
from kohya_mps.core.text import shorten, strip_ansi

from . import catalogue
from .catalogue import Failure

_CHUNK = 1 << 20
# What is looked at again with the next piece: a sign and what stands before it lie within.
_OVERLAP = 16 * 1024
_BEFORE = 4 * 1024

_EXCEPTION = re.compile(
    rb"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Invalid)\b(?::[^\r\n]*)?", re.MULTILINE
)


class Found(msgspec.Struct, frozen=True):
    """A known failure in a log: the line that shows it last, and that line's number, from 1."""

    failure: Failure
    line: int
    text: str


class Explanation(msgspec.Struct, frozen=True):
    """What a log shows: known failures, the latest first, and the last error that it names."""

    found: tuple[Found, ...]
    last_error: str
    lines: int


class _Search(msgspec.Struct, frozen=True):
    """A sign made ready: text without its ``word`` need not be searched for the pattern."""

    failure: Failure
    word: bytes
    pattern: re.Pattern[bytes]
    after: re.Pattern[bytes] | None


def _prefilter_patterns(known: Iterable[Failure]) -> list[_Search]:
    """All signs, with as few different words as possible: looking for them is what takes the time."""
    signs = [(failure, sign, set(sign.text.encode().split())) for failure in known for sign in failure.log]
    chosen: dict[int, bytes] = {}
    while open_signs := [index for index in range(len(signs)) if index not in chosen]:
        counts = Counter(word for index in open_signs for word in signs[index][2] if len(word) >= _WORD)
        # The longest of equally common ones; a sign of short words gets its longest.
        common = max(counts, key=lambda word: (counts[word], len(word), word), default=b"")
        covered = [index for index in open_signs if common and common in signs[index][2]]
        for index in covered or open_signs:
            chosen[index] = common if covered else max(signs[index][2], key=len)
    return [
        _Search(
            failure,
            chosen[index],
            _any_whitespace(sign.text),
            _any_whitespace(sign.after) if sign.after else None,
        )
        for index, (failure, sign, _) in enumerate(signs)
    ]


# Shorter words stand in every log.
_WORD = 5


def explain(log: str) -> Report:
    """Look for known failures in a log.

    Args:
        log: its path, or ``-`` for standard input.

    Raises:
        UsageError: there is no such file, or nothing is piped in.
    """
    if log == "-":
        if sys.stdin.isatty():
            raise UsageError(
                "there is no log to explain", "`invoke explain LOG`, or pipe one into `invoke explain`"
            )
        return report(search(sys.stdin.buffer), "standard input")
    try:
        with Path(log).open("rb") as file:
            return report(search(file), log)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{log}: cannot be read: {error}", "give the path of a log or a traceback"
        ) from error


def search(stream: BinaryIO, known: Iterable[Failure] | None = None) -> Explanation:
    """Read a log to its end and find the known failures in it."""
    order = catalogue.known() if known is None else tuple(known)
    searches = _prefilter_patterns(order)
    latest: dict[str, Found] = {}
    last_error = ""
    newlines, window = 0, b""
    while piece := stream.read(_CHUNK):
        text = strip_ansi(window + piece)
        for found in _in_window(text, searches, newlines):
            seen = latest.get(found.failure.id)
            if seen is None or found.line >= seen.line:
                latest[found.failure.id] = found
        for match in _EXCEPTION.finditer(text):
            last_error = _readable(match[0])
        window = (window + piece)[-_OVERLAP:]
        newlines += (text.count(b"\n")) - strip_ansi(window).count(b"\n")
    by_line: dict[int, Found] = {}
    for failure in order:  # of two that one line shows, the first of the data is the special one
        if failure.id in latest:
            by_line.setdefault(latest[failure.id].line, latest[failure.id])
    newest_first = sorted(by_line.values(), key=lambda found: -found.line)
    return Explanation(tuple(newest_first), last_error, newlines + strip_ansi(window).count(b"\n"))


def report(explanation: Explanation, log: str) -> Report:
    """What was found, as the report of ``invoke explain``.

    A log that could be explained is no failure of the command: its rows are warnings.
    """
    checks = [
        Check(
            f"line {f.line}",
            Status.WARN,
            f"{f.text}\n{f.failure.cause}",
            f"{f.failure.remedy}{_sources(f.failure)}",
        )
        for f in explanation.found
    ]
    if not checks:
        last = f"; the last error: {explanation.last_error}" if explanation.last_error else ""
        detail = f"none in {explanation.lines} lines{last}"
        checks = [Check("known failures", Status.SKIP, detail)]
    extra = {
        "log": log,
        "failures": [
            {
                "id": f.failure.id,
                "line": f.line,
                "text": f.text,
                "cause": f.failure.cause,
                "remedy": f.failure.remedy,
                "sources": f.failure.sources,
            }
            for f in explanation.found
        ],
        "last_error": explanation.last_error,
        "lines": explanation.lines,
    }
    summary = () if explanation.found else ("`invoke doctor` looks at the machine and the installation.",)
    return Report(f"Known failures in {log}", tuple(checks), extra, summary)


def print_known_failures(output: str) -> bool:
    """Explain the last lines of a program that failed here, on standard error.

    Failures of other devices than this machine's are left out.

    Returns:
        Whether a known failure was in them.
    """
    here = [failure for failure in catalogue.known() if expected_device() in failure.devices]
    explanation = search(io.BytesIO(output.encode(errors="replace")), here)
    for found in explanation.found[:3]:
        say(f"\nknown failure: {found.text}")
        say(f"  why:   {found.failure.cause}")
        say(f"  mend:  {found.failure.remedy}")
        say(f"  from:  {', '.join(found.failure.sources)}")
    return bool(explanation.found)


def _in_window(text: bytes, searches: list[_Search], newlines: int) -> Iterator[Found]:
    present = {word for word in {search.word for search in searches} if word in text}
    for search in searches:
        if search.word not in present:
            continue
        last = None
        for match in search.pattern.finditer(text):
            if search.after is None or search.after.search(
                text, max(0, match.start() - _BEFORE), match.start()
            ):
                last = match
        if last is not None:
            line = newlines + text.count(b"\n", 0, last.start()) + 1
            yield Found(search.failure, line, _line(text, last.start(), last.end()))


def _any_whitespace(text: str) -> re.Pattern[bytes]:
    """The words of a text with any white space between them: logs are wrapped to the terminal.

    The trainers' logger puts the place in the code at the end of a message's first line.
    """
    return re.compile(rb"\s+(?:\w+\.py:\d+\s+)?".join(re.escape(word) for word in text.encode().split()))


def _line(text: bytes, start: int, end: int) -> str:
    """The line of a match; a progress bar's redraws are lines of their own."""
    first = max(text.rfind(b"\n", 0, start), text.rfind(b"\r", 0, start)) + 1
    ends = [at for at in (text.find(b"\n", end), text.find(b"\r", end)) if at >= 0]
    return _readable(text[first : min(ends, default=len(text))][: end - first + 200])


def _readable(line: bytes) -> str:
    words = " ".join(line.decode(errors="replace").split())
    printable = "".join(c if c.isprintable() else "�" for c in words)
    return shorten(printable, 300)


def _sources(failure: Failure) -> str:
    named = [catalogue.source_url(source) or source for source in failure.sources]
    return f" (source: {', '.join(named)})" if named else ""
