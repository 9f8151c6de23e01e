"""The catalogue: every entry catches its failure and lets a near miss pass; a wrong file is refused."""

from __future__ import annotations

import io
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.diagnose import machine_facts, preflight, training_facts
from kohya_mps.known_failures import catalogue, log_search, rules
from kohya_mps.known_failures.catalogue import Failure
from kohya_mps.known_failures.rules import Target
from tests.support.failure_cases import CASES, Preflight
from tests.support.world import World

KNOWN = {failure.id: failure for failure in catalogue.load()}
HEALTHY = machine_facts.MachineFacts(
    system="Darwin", architecture="arm64", rosetta=False, virtual_machine=False, macos="15.1",
    macos_needed="11.0", macos_is_older=False, tools_python="3.11.9", trainer_python="3.11.9", tkinter=True,
    git="git version 2.39.5", xcode="/Library/Developer/CommandLineTools", free_gb=200.0, needed_gb=3.0,
    memory_gb=32.0, conda=None, other_venv=None, pythonpath=None, hf_home=None, hf_home_is_file=False,
    mps_fallback=None, high_watermark=1.7, low_watermark=1.4, watermark_nonsense=None,
    home="/Users/me/tools/kohya_ss", home_has_space=False, case_sensitive=False,
    venv="/Users/me/tools/kohya_ss/venv", foreign_venv=False, installed=True, interrupted=False,
    config="/x/accelerate.yaml", config_use_cpu=False, default_config="/x/default_config.yaml",
    default_use_cpu=False, default_config_is_directory=False,
)  # fmt: skip


def seen_in(where: str) -> list[str]:
    return [failure.id for failure in KNOWN.values() if getattr(failure, where)]


def target(failure: Failure) -> Target:
    return preflight.target_for(settings.load(), failure.devices[0])


def preflight_ids(
    case: Preflight, failure: Failure, root: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    options = preflight.PreflightOptions(
        case.make(World(root)),
        device=case.device or failure.devices[0],
        trainer=case.trainer,
        memory_gb=case.memory_gb,
    )
    found: list[str] = preflight.check(settings.load(), options).extra["failures"]
    return found


def environment_ids(changed: dict[str, Any], failure: Failure) -> list[str]:
    facts = msgspec.structs.asdict(HEALTHY) | changed
    found = rules.matching(tuple(KNOWN.values()), "environment", facts, target(failure))
    return [finding.failure.id for finding in found]


def log_ids(text: str, device: str) -> list[str]:
    here = [failure for failure in KNOWN.values() if device in failure.devices]
    return [found.failure.id for found in log_search.search(io.BytesIO(text.encode()), here).found]


def test_every_entry_has_a_case_for_each_way_it_can_be_seen() -> None:
    lacking = [
        f"{failure.id}: {where}"
        for failure in KNOWN.values()
        for where in ("settings", "environment", "log")
        if bool(getattr(failure, where))
        is not (failure.id in CASES and getattr(CASES[failure.id], where) is not None)
    ]

    assert not lacking
    assert not CASES.keys() - KNOWN.keys()


@pytest.mark.parametrize("name", seen_in("settings"))
def test_preflight_catches_it_in_the_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name].settings
    assert case is not None

    assert name in preflight_ids(case.caught, KNOWN[name], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", seen_in("settings"))
def test_preflight_lets_the_near_miss_pass(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name].settings
    assert case is not None

    assert name not in preflight_ids(case.passes, KNOWN[name], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", seen_in("environment"))
def test_doctor_catches_it_in_the_environment_and_lets_the_near_miss_pass(name: str) -> None:
    case = CASES[name].environment
    assert case is not None

    assert name in environment_ids(case.caught, KNOWN[name])
    assert name not in environment_ids(case.passes, KNOWN[name])


@pytest.mark.parametrize("name", seen_in("log"))
def test_explain_finds_it_in_a_log_and_lets_the_near_miss_pass(name: str) -> None:
    case = CASES[name].log
    assert case is not None

    device = KNOWN[name].devices[0]
    assert name in log_ids(case.caught, device)
    assert name not in log_ids(case.passes, device)


def test_every_log_pattern_is_found_by_itself() -> None:
    for failure in KNOWN.values():
        for pattern in failure.log:
            text = f"{pattern.after}\n{pattern.text}"
            assert failure.id in log_ids(text, failure.devices[0]), pattern


def test_a_healthy_mac_has_none_of_them() -> None:
    mac = preflight.target_for(settings.load(), "mps")

    assert not list(
        rules.matching(tuple(KNOWN.values()), "environment", msgspec.structs.asdict(HEALTHY), mac)
    )


def test_a_good_training_has_none_of_them(tmp_path: Path) -> None:
    report = preflight.check(
        settings.load(), preflight.PreflightOptions(World(tmp_path).toml(), device="mps")
    )

    assert [check for check in report.checks if check.status != "pass"] == []


@pytest.mark.parametrize("where", ["settings", "environment"])
def test_rules_read_facts_that_exist(where: str) -> None:
    machine = set(machine_facts.MachineFacts.__struct_fields__)
    names = set(training_facts.FACTS) if where == "settings" else machine
    for failure in KNOWN.values():
        for rule in getattr(failure, where):
            read = {name for condition in rule.when for name in condition.names()}
            shown = {f for _, f, _, _ in string.Formatter().parse(rule.found) if f}
            unknown = (
                {n for n in read | shown if not n.startswith("package_")} - names - {"device", "profile"}
            )
            assert not unknown, f"{failure.id}: {rule.about}"


def test_fixes_change_settings_that_the_trainers_know() -> None:
    from kohya_mps.trainer_config.trainer_options import NAMES

    changed = {name for failure in KNOWN.values() for rule in failure.settings for name in rule.change}

    assert changed <= NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("failures: [{id: x}]", "missing required field"),
        ("failures: [{id: x, seen: s, cause: c, remedy: r, sources: []}]", "no note says why"),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], note: n, devices: [tpu]}]",
            "accepted: mps, cuda, cpu",
        ),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], "
            "settings: [{about: a, found: f, when: []}]}]",
            "would always hold",
        ),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], "
            "settings: [{about: a, found: f, when: [{of: y, matches: '('}]}]}]",
            "y: ",
        ),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], "
            "settings: [{about: a, found: f, when: [{of: y, version: new}]}]}]",
            "y: ",
        ),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], log: [{text: ' '}]}]",
            "match every log",
        ),
        (
            "failures: [{id: x, seen: s, cause: c, remedy: r, sources: [], note: n}, "
            "{id: x, seen: s, cause: c, remedy: r, sources: [], note: n}]",
            "another entry with this id",
        ),
    ],
)
def test_an_invalid_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "failures.yaml"
    path.write_text(text)

    with pytest.raises(UsageError, match=message) as caught:
        catalogue.load(path)
    assert str(path) in caught.value.what
