from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from kohya_mps.core import settings

Job = dict[str, Any]


WORKFLOWS = settings.ROOT / ".github" / "workflows"


def jobs_of(name: str) -> dict[str, Job]:
    """The jobs of a workflow, by name."""
    found: dict[str, Job] = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))["jobs"]
    return found


@pytest.fixture
def jobs() -> dict[str, Job]:
    """The jobs of the weekly refresh, by name."""
    return jobs_of("refresh.yml")


def commands(job: Job) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


def before(jobs: dict[str, Job], name: str) -> set[str]:
    """Every job that has to have succeeded first."""
    needs = jobs[name].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(before(jobs, each) for each in direct))


def test_a_change_is_proposed_only_after_it_was_exercised(jobs: dict[str, Job]) -> None:
    (proposer,) = (name for name, job in jobs.items() if "gh pr create" in commands(job))
    done = "\n".join(commands(jobs[name]) for name in before(jobs, proposer))
    for session in (
        "lock -- --upgrade --cutoff",
        "lock_check",
        "cross_check",
        "smoke",
        "train_step -- --builtin",
    ):
        assert f"nox -s {session}" in done
    assert not [name for name in before(jobs, proposer) if "continue-on-error" in str(jobs[name])]


def test_a_failure_in_front_of_a_pipe_stops_the_job() -> None:
    text = (WORKFLOWS / "refresh.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["defaults"] == {"run": {"shell": "bash"}}


def test_every_profile_is_exercised(jobs: dict[str, Job]) -> None:
    for name in ("exercise", "mac"):
        assert sorted(jobs[name]["strategy"]["matrix"]["profile"]) == settings.profile_names()
        assert jobs[name]["env"]["KOHYA_PROFILE"] == "${{ matrix.profile }}"


def test_only_the_job_that_proposes_may_write(jobs: dict[str, Job]) -> None:
    assert {name for name, job in jobs.items() if "write" in str(job.get("permissions"))} == {"propose"}


def test_the_locks_are_brought_before_the_tools_are_installed_from_them(jobs: dict[str, Job]) -> None:
    for name in ("exercise", "mac"):
        used = [step.get("uses", "").split("@")[0] for step in jobs[name]["steps"]]
        assert used.index("actions/download-artifact") < used.index("$/.github/actions/tools")


def sessions_named(jobs: dict[str, Job]) -> set[str]:
    return {name for job in jobs.values() for name in re.findall(r"nox -s (\w+)", commands(job))}


@pytest.mark.parametrize("workflow", sorted(path.name for path in WORKFLOWS.iterdir()))
def test_the_sessions_of_a_workflow_exist(workflow: str) -> None:
    source = (settings.ROOT / "noxfile.py").read_text(encoding="utf-8")
    known = set(re.findall(r"^def (\w+)\(session: nox\.Session\)", source, re.MULTILINE))
    assert sessions_named(jobs_of(workflow)) - known == set()


def test_vulnerabilities_and_upstreams_requirements_are_looked_at_every_week(jobs: dict[str, Job]) -> None:
    assert {"audit", "upstream"} <= sessions_named(jobs)


def test_ci_tests_with_the_kohya_ss_that_is_pinned() -> None:
    variables = jobs_of("ci.yml")["upstream"]["env"]
    pinned = yaml.safe_load((settings.CONFIG / "settings.yaml").read_text(encoding="utf-8"))["checkout"]
    assert (variables["KOHYA_REPO_URL"], variables["KOHYA_COMMIT"]) == (pinned["url"], pinned["commit"])


def test_the_tools_are_installed_in_ci_by_readmes_command() -> None:
    readme = (settings.ROOT / "README.md").read_text(encoding="utf-8")
    ci_run = (settings.ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert ci_run[-1] in readme
    action = yaml.safe_load((settings.ROOT / ".github/actions/tools/action.yml").read_text(encoding="utf-8"))
    assert f"{action['runs']['steps'][-1]['run']} && .venv/bin/nox -t ci" == ci_run[-1]
