from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from kohya_mps.core import settings

Job = dict[str, Any]


@pytest.fixture
def jobs() -> dict[str, Job]:
    """The jobs of the weekly refresh, by name."""
    text = (settings.ROOT / ".github" / "workflows" / "refresh.yml").read_text(encoding="utf-8")
    found: dict[str, Job] = yaml.safe_load(text)["jobs"]
    return found


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
    text = (settings.ROOT / ".github" / "workflows" / "refresh.yml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["defaults"] == {"run": {"shell": "bash"}}


def test_every_profile_is_exercised(jobs: dict[str, Job]) -> None:
    for name in ("exercise", "mac"):
        assert sorted(jobs[name]["strategy"]["matrix"]["profile"]) == settings.profile_names()
        assert jobs[name]["env"]["KOHYA_PROFILE"] == "${{ matrix.profile }}"


def test_only_the_job_that_proposes_may_write(jobs: dict[str, Job]) -> None:
    assert {name for name, job in jobs.items() if "write" in str(job.get("permissions"))} == {"propose"}


def test_its_sessions_exist(jobs: dict[str, Job]) -> None:
    named = {s for job in jobs.values() for s in re.findall(r"nox -s (\w+)", commands(job))}
    source = (settings.ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert named <= set(re.findall(r"^def (\w+)\(session: nox\.Session\)", source, re.MULTILINE))
    assert {"audit", "upstream"} <= named
