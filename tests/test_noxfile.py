from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def nox(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # As its own program: `python -m nox` would put the repository on sys.path, plain nox does not.
    return subprocess.run(
        [sys.executable, "-c", "import sys; from nox.__main__ import main; sys.exit(main())", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONSAFEPATH": "1", **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def listed() -> str:
    done = nox("--list")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_session_says_what_it_does(listed: str) -> None:
    lines = re.findall(r"^[*-] (\w+)(?: \[.*?\])? -> (.*)$", listed, re.MULTILINE)
    assert {"lint", "tests", "venv", "smoke", "train_step", "lock"} <= {name for name, _ in lines}
    assert len(lines) == len(re.findall(r"^@nox.session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    for _, description in lines:
        assert description[0].isupper()
        assert description.endswith((".", "]."))


def test_plain_nox_is_the_contributors_loop_and_builds_no_environment(listed: str) -> None:
    selected = {line.split()[1] for line in listed.splitlines() if line.startswith("* ")}
    assert {"lint", "tests"} <= selected
    assert not selected & {"venv", "smoke", "train_step", "real", "lock", "bench"}


@pytest.mark.parametrize("session", ["venv", "smoke", "train_step"])
def test_a_wrong_setting_ends_a_session_with_2_and_the_remedy(session: str, tmp_path: Path) -> None:
    done = nox("-s", session, KOHYA_HOME=str(tmp_path / "home"), KOHYA_COMMIT="master")
    assert done.returncode == 2
    assert "40 hexadecimal digits" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "home").exists()


def test_the_training_steps_own_help_and_its_wrong_options() -> None:
    helped = nox("-s", "train_step", "--", "--help")
    assert "nox -s train_step --" in helped.stdout
    assert "--builtin" in helped.stdout
    wrong = nox("-s", "train_step", "--", "--network", "full")
    assert wrong.returncode == 2
    assert "invalid choice: 'full'" in wrong.stderr


def test_plain_noxs_arguments_for_the_tests_do_not_end_the_check_of_the_locks() -> None:
    done = nox("-s", "lock_check", "--", "-k", "some test", "--json")
    assert done.returncode == 0, done.stderr
    assert '"ok": true' in done.stdout


def test_the_body_of_a_session_is_at_most_twelve_lines_and_asks_for_no_sessions_name() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert "session.name" not in text
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 12, node.name
