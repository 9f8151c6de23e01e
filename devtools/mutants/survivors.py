"""Compare the planted faults that no test noticed with the list of those that may stay.

usage: python -m devtools.mutants.survivors [--json]
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import orig_function_and_class_names_from_key

from devtools import posargs
from kohya_mps.core.errors import StepFailed
from kohya_mps.core.report import Check, Report, Status
from kohya_mps.core.settings import ROOT, read_yaml

LIST = ROOT / "tests" / "survivors.yaml"

#: The share of the planted faults that a test has to notice, in percent.
FLOOR = 85.0

# What mutmut calls a mutant that no test noticed. A test that never ends has noticed one, too.
_SURVIVED = ("survived", "no tests")


class Mutant(msgspec.Struct, frozen=True):
    """A planted fault, such as ``kohya_mps.install.receipt.read: a == b -> a != b``.

    mutmut's own names count the mutants of a function, and would be others after every edit.
    """

    module: str
    change: str
    survived: bool

    @property
    def name(self) -> str:
        """What it is called in the list."""
        return f"{self.module}.{self.change}"


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why mutants may survive."""

    reason: str
    mutants: tuple[str, ...]


def planted() -> Iterator[Mutant]:
    """The mutants of the last run of mutmut, read from ``mutants/``.

    Raises:
        StepFailed: the run was not finished.
    """
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        for key, code in data.exit_code_by_key.items():
            status = status_by_exit_code[code]
            if status in ("not checked", "check was interrupted by user"):
                raise StepFailed(f"{path}: not every mutant was tried", "run `nox -s mutants` to its end")
            module = ".".join(path.with_suffix("").parts)
            yield Mutant(module, _change(key, path), status in _SURVIVED)


def _change(key: str, path: Path) -> str:
    """The function, the lines that were taken out and those that were put in."""
    lines = get_diff_for_mutant(key, path=path).splitlines()[2:]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    function, owner = orig_function_and_class_names_from_key(key)
    return f"{owner + '.' if owner else ''}{function}: {before} -> {after}"


def judge(mutants: Sequence[Mutant], reasons: Sequence[Reason]) -> Report:
    """The share that was noticed, by module, and each survivor that has no reason yet."""
    of = Counter(one.module for one in mutants)
    killed = Counter(one.module for one in mutants if not one.survived)
    survivors = {one.name for one in mutants if one.survived}
    listed = {name for reason in reasons for name in reason.mutants}
    share = 100 * killed.total() / max(of.total(), 1)
    checks = [Check(module, Status.PASS, _noticed(killed[module], of[module])) for module in sorted(of)]
    detail = f"{_noticed(killed.total(), of.total())}; at least {FLOOR:g} %"
    checks.append(Check.of("all", share >= FLOOR, detail, "write tests for the survivors"))
    for name in sorted(survivors - listed):
        fix = f"write a test that notices it, or put it into {LIST.relative_to(ROOT)} with the reason"
        checks.append(Check("new survivor", Status.FAIL, name, fix))
    for name in sorted(listed - survivors):
        fix = f"take it out of {LIST.relative_to(ROOT)}"
        # Not a failure: on a busy machine a test may notice a mutant because it takes too long.
        checks.append(Check("no survivor", Status.WARN, name, fix))
    extra = {"killed": killed.total(), "mutants": of.total(), "share": round(share, 1)}
    return Report("Planted faults", tuple(checks), extra)


def _noticed(killed: int, of: int) -> str:
    return f"{killed} of {of} noticed ({100 * killed / max(of, 1):.0f} %)"


def main() -> None:
    """Print the report."""
    parser = posargs.parser("mutants", "Plant faults in the modules that decide; a test has to notice each.")
    posargs.run(
        sys.argv[1:],
        parser.parse_args,
        lambda _: judge(list(planted()), read_yaml(LIST, list[Reason])),
    )


if __name__ == "__main__":
    main()
