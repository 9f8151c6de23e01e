"""Run mutmut over the modules that pyproject.toml names.

usage: python -m devtools.mutants.plant [MUTANT ...]

With names of mutants only those are planted again; otherwise all are, from the beginning:
mutmut would keep the result of a mutant although a test has been written for it since.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import libcst
from mutmut.__main__ import cli
from mutmut.mutation import mutators

MUTANTS = Path("mutants")


def identifiers_alone(node: libcst.BaseString) -> Iterable[libcst.BaseString]:
    """What mutmut does to a string, except to a sentence for people: tests do not compare its words."""
    if isinstance(node, libcst.SimpleString) and " " in node.value:
        return []
    return mutators.operator_string(node)


def main() -> None:
    """Plant the mutants that were named, or all."""
    operators = mutators.mutation_operators
    operators[:] = [  # type: ignore[index]
        (kind, identifiers_alone if operator is mutators.operator_string else operator)
        for kind, operator in operators
    ]
    if len(sys.argv) == 1:
        shutil.rmtree(MUTANTS, ignore_errors=True)
    cli(["run", *sys.argv[1:]], standalone_mode=False)


if __name__ == "__main__":
    main()
