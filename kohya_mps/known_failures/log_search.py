"""``invoke explain``: finds known failures in a log or traceback of any size, in constant memory."""

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
# The end of a piece that is searched again with the next: a pattern and what stands before it fit in.
_OVERLAP = 16 * 1024
_BEFORE = 4 * 1024

_EXCEPTION = re.compile(
    rb"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Invalid)\b(?::[^\r\n]*)?", re.MULTILINE
)


class Found(msgspec.Struct, frozen=True):
    """A known failure in a log: the last line that shows it, and the number of that line, from 1."""

    failure: Failure
    line: int
    text: str


class Explanation(msgspec.Struct, frozen=True):
    """What a log shows: known failures, the latest first, the last exception in it, and its length."""

    found: tuple[Found, ...]
    last_error: str
    lines: int


class _Search(msgspec.Struct, frozen=True):
    """A compiled pattern. Text without ``word`` cannot match and is not searched."""

    failure: Failure
    word: bytes
    pattern: re.Pattern[bytes]
    after: re.Pattern[bytes] | None


def _prefilter_patterns(failures: Iterable[Failure]) -> list[_Search]:
    """Compile all log patterns, each with a word that a matching text must contain."""
    patterns = [(failure, pattern) for failure in failures for pattern in failure.log]
    words = _covering_words([set(pattern.text.encode().split()) for _, pattern in patterns])
    return [
        _Search(failure, word, _any_whitespace(p.text), _any_whitespace(p.after) if p.after else None)
        for (failure, p), word in zip(patterns, words, strict=True)
    ]


# Shorter words stand in every log.
_SHORTEST_WORD = 5


def _covering_words(sets: list[set[bytes]]) -> list[bytes]:
    """Choose one word of each set, so that few different words are chosen (greedy set cover).

        {module, named, xformers}, {module, named, triton}, {nan}  ->  module, module, nan

    Looking for the words in every piece is what takes the time.
    """
    chosen: dict[int, bytes] = {}
    while uncovered := [index for index in range(len(sets)) if index not in chosen]:
        counts = Counter(word for index in uncovered for word in sets[index] if len(word) >= _SHORTEST_WORD)
        best = max(counts, key=lambda word: (counts[word], len(word), word), default=b"")
        if best:
            chosen |= {index: best for index in uncovered if best in sets[index]}
        else:  # only short words are left: each set gets its longest
            chosen |= {index: max(sets[index], key=len) for index in uncovered}
    return [chosen[index] for index in range(len(sets))]


def explain(log: str) -> Report:
    """Look for known failures in a log.

    Args:
        log: its path, or ``-`` for standard input.

    Raises:
        UsageError: the file cannot be read, or standard input is the keyboard.
    """
    if log == "-":
        if sys.stdin.isatty():
            raise UsageError(
                "there is no log on standard input",
                "`invoke explain LOG`, or pipe one into `invoke explain -`",
            )
        return report(search(sys.stdin.buffer), "standard input")
    try:
        with Path(log).open("rb") as file:
            return report(search(file), log)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{log}: cannot be read: {error}", "give the path of a log or a traceback"
        ) from error


def search(stream: BinaryIO, failures: Iterable[Failure] | None = None) -> Explanation:
    """Read a log to its end and find known failures in it.

    Args:
        stream: the log.
        failures: which ones to look for; all of the catalogue when left out.
    """
    order = catalogue.known() if failures is None else tuple(failures)
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
    for failure in order:  # if one line shows two failures, the earlier entry is the more specific one
        if failure.id in latest:
            by_line.setdefault(latest[failure.id].line, latest[failure.id])
    newest_first = sorted(by_line.values(), key=lambda found: -found.line)
    return Explanation(tuple(newest_first), last_error, newlines + strip_ansi(window).count(b"\n"))


def report(explanation: Explanation, log: str) -> Report:
    """The report of ``invoke explain``.

    Rows are warnings: the command did not fail because the log shows a failure.
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
    """Explain the output of a program that failed on this machine, on standard error.

    Failures of other devices are left out.

    Returns:
        Whether the output has a known failure.
    """
    possible = [failure for failure in catalogue.known() if expected_device() in failure.devices]
    explanation = search(io.BytesIO(output.encode(errors="replace")), possible)
    for found in explanation.found[:3]:
        say(f"\nknown failure: {found.text}")
        say(f"  why:   {found.failure.cause}")
        say(f"  fix:   {found.failure.remedy}")
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
    """Match the words of a text with any white space between them: logs are wrapped to the terminal.

    The trainers' logger writes ``file.py:123`` at the end of the first line of a message.
    """
    return re.compile(rb"\s+(?:\w+\.py:\d+\s+)?".join(re.escape(word) for word in text.encode().split()))


def _line(text: bytes, start: int, end: int) -> str:
    """The line of a match; each redraw of a progress bar counts as a line."""
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
