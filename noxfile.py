"""What contributors and CI type: ``nox -l`` lists it, plain ``nox`` is the contributor's loop."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))  # plain `nox` does not, and the sessions call the package

from devtools import posargs  # noqa: E402
from kohya_mps.core import settings  # noqa: E402

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True

DEV = ("--require-hashes", "-r", "constraints/dev.txt")
# One more than there are cores: some tests wait for a process.
PARALLEL = ("-n", str((os.cpu_count() or 1) + 1), "--dist", "worksteal")
FAST = "not environment and not slow"


@nox.session(tags=["ci"])
def lint(session: nox.Session) -> None:
    """Check format, style, types, the floors of the rooms and the workflows."""
    session.install(*DEV)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-logo", "--no-cache")
    # actionlint comes only as a program to download, or as a source package that downloads it: no lock.
    session.run("zizmor", "--offline", "--persona=pedantic", "--strict-collection", ".github")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the fast tests in parallel; `nox -t ci` runs all tests."""
    session.install(*DEV)
    marks = [] if "-m" in session.posargs else ["-m", FAST]
    session.run("python", "-m", "pytest", *PARALLEL, *marks, *session.posargs)


@nox.session(default=False)
def real(session: nox.Session) -> None:
    """Run the tests that build the real environment and train in it."""
    session.install(*DEV)
    session.run("python", "-m", "pytest", "-m", "environment", *session.posargs)


@nox.session(tags=["ci"], default=False)
def coverage(session: nox.Session) -> None:
    """Run all tests, slow and real ones too, and hold what they cover to its floors."""
    session.install(*DEV)
    session.run("coverage", "erase")
    many = ("-m", "not environment", "--hypothesis-profile", "many")
    session.run("coverage", "run", "-m", "pytest", *PARALLEL, *many, *session.posargs)
    session.run("coverage", "run", "-m", "pytest", "-m", "environment", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report", "--include", "kohya_mps/*", "--fail-under", "95")
    session.run("coverage", "report", "--fail-under", "85")


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Plant faults in the modules that decide, and see that a test notices each [-- --json]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.mutants.plant", silent=True)
    session.run("python", "-m", "devtools.mutants.survivors", *session.posargs)


@nox.session(venv_backend="none", default=False)
def venv(session: nox.Session) -> None:
    """Build the pinned environment of KOHYA_HOME from its lock and make it the active one [-- --json]."""
    from kohya_mps.install import environment

    parser = posargs.parser("venv", "Build the pinned environment of KOHYA_HOME and make it the active one.")
    posargs.run(session.posargs, parser.parse_args, lambda _: environment.rebuild(settings.load()))


@nox.session(venv_backend="none", default=False)
def smoke(session: nox.Session) -> None:
    """Build the environment in isolation and run the smoke check in it [-- --json]."""
    from devtools import sandbox

    parser = posargs.parser("smoke", "Build the environment in isolation and run the smoke check in it.")
    posargs.run(session.posargs, parser.parse_args, lambda _: sandbox.run_smoke_check(settings.load()))


@nox.session(venv_backend="none", default=False)
def train_step(session: nox.Session) -> None:
    """Train a few steps with the real trainer in isolation [-- --help]."""
    from devtools import sandbox

    posargs.run(
        session.posargs,
        sandbox.parse_options,
        lambda options: sandbox.run_training_step(settings.load(), options),
    )


@nox.session(venv_backend="none", default=False)
def lock(session: nox.Session) -> None:
    """Make the hashed locks from their .in files [-- LOCK ... --upgrade --profile NAME --cutoff DATE]."""
    from devtools.locks import make

    posargs.run(session.posargs, make.parse_options, make.make_all)


@nox.session(venv_backend="none", tags=["ci"])
def lock_check(session: nox.Session) -> None:
    """Check offline that every lock is unedited and agrees with its .in file [-- --json]."""
    from devtools.locks import check

    parser = posargs.parser("lock_check", "Check offline that every lock agrees with its .in file.")
    # Plain nox gives what follows -- to each session of the loop: what the tests take is not ours.
    posargs.run(session.posargs, parser.parse_known_args, lambda _: check.check_all())


@nox.session(default=False)
def cross_check(session: nox.Session) -> None:
    """Prove that a Mac could load what the locks install [-- LOCK ... --json]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.locks.cross_check", *session.posargs)


@nox.session(venv_backend="none", default=False)
def upstream(session: nox.Session) -> None:
    """Explain why upstream's own macOS requirements cannot be installed [-- --commit ID --json]."""
    from devtools.locks import upstream

    posargs.run(
        session.posargs,
        upstream.parse_options,
        lambda options: upstream.run(settings.load(), options),
    )


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Look up known vulnerabilities of the locks [-- LOCK ... --json]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.locks.audit", *session.posargs)


@nox.session(venv_backend="none", default=False)
def pages(session: nox.Session) -> None:
    """Write the pages of docs/ that are made from data [-- --json]."""
    from devtools.docs import pages

    parser = posargs.parser("pages", "Write the pages of docs/ that are made from data.")
    posargs.run(session.posargs, parser.parse_args, lambda _: pages.write())


@nox.session(tags=["ci"], default=False)
def docs(session: nox.Session) -> None:
    """Build the site from the pages into .nox/site; a broken link fails."""
    session.install("--require-hashes", "-r", "constraints/docs.txt")
    # -n: every cross-reference has to lead somewhere; -W: a warning is a failure.
    session.run("sphinx-build", "-E", "-n", "-W", "--keep-going", "-q", "-c", "docs", ".", ".nox/site")


@nox.session(default=False)
def pictures(session: nox.Session) -> None:
    """Make README's pictures from a real set-up and training [-- --home DIR]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.docs.pictures", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure what this costs over the bare tools, as ratios in one run [-- --help]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.bench", *session.posargs)


@nox.session(venv_backend="none", default=False)
def rehearse(session: nox.Session) -> None:
    """Rehearse a training on a simulated MPS device, on any machine [-- --help]."""
    from devtools.rehearsal import runner

    posargs.run(session.posargs, runner.parse_options, runner.rehearse)


@nox.session(venv_backend="none", default=False)
def rehearse_matrix(session: nox.Session) -> None:
    """Rehearse all networks, optimizers and options, and write docs/mps-support.md [-- --help]."""
    from devtools.rehearsal import matrix

    posargs.run(session.posargs, matrix.parse_options, matrix.rehearse)


@nox.session(default=False)
def rehearse_data(session: nox.Session) -> None:
    """Make the rehearsals' operator data from the locks' macOS wheels [-- PROFILE ... --json]."""
    session.install(*DEV)
    session.run("python", "-m", "devtools.rehearsal.wheel", *session.posargs)


@nox.session(venv_backend="none", default=False)
def chaos(session: nox.Session) -> None:
    """Kill, starve and damage set-ups, and see that one rerun mends each [-- --help]."""
    from devtools.chaos import faults

    posargs.run(session.posargs, faults.parse_options, lambda options: faults.run(settings.load(), options))
