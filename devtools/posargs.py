"""The arguments of nox sessions: what follows ``nox -s NAME --`` is parsed here, the same way for all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeVar

from kohya_mps.core import cli
from kohya_mps.core.report import Report

Options = TypeVar("Options")

_JSON = "--json"


def parser(session: str, description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for one session, with ``--json``; its ``--help`` shows the command as it is typed."""
    # Without abbreviations: `run` looks for the option itself, and only whole words can be found.
    made = argparse.ArgumentParser(
        prog=f"nox -s {session} --", description=description, epilog=epilog, allow_abbrev=False
    )
    made.add_argument(_JSON, action="store_true", help="print the report as JSON to standard output")
    return made


def add_locks(to: argparse.ArgumentParser, known: Sequence[str]) -> None:
    """Add ``LOCK …``, read as ``names``; the session checks that they exist."""
    to.add_argument("names", nargs="*", metavar="LOCK", help=f"one of {', '.join(known)}; all if left out")


def run(
    arguments: Sequence[str],
    parse: Callable[[Sequence[str]], Options],
    step: Callable[[Options], Report | int],
) -> None:
    """Parse a session's arguments, run its step, and print the report or end with its exit code.

    The arguments are parsed inside, so that an error in them, or in a file that says which
    are accepted, ends with the documented exit code and as JSON where that was requested.
    What follows a second ``--`` belongs to another program.
    """
    own = takewhile(lambda argument: argument != "--", arguments)
    cli.run_task(lambda: step(parse(arguments)), json=_JSON in own)
