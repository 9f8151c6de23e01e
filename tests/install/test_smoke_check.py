from __future__ import annotations

import json

import pytest

from kohya_mps.core.installation import Installation
from kohya_mps.core.machine import expected_device
from kohya_mps.core.report import Status
from kohya_mps.core.settings import PROBES, load_gui
from kohya_mps.install import smoke_check
from kohya_mps.install.generations import Generation, Manifest
from kohya_mps.install.inventory import Inventory
from tests.support.installs import PYTHON, Small, stand_in_python
from tests.support.reports import failed

# Stands in for the trainer's interpreter with the probe: keeps the request, writes these rows.
PROBE = """
import json, os, pathlib, shutil, sys
script, request, result = sys.argv[-3:]
assert script == {script!r}
assert pathlib.Path.cwd() == pathlib.Path(request).parent == pathlib.Path(result).parent
assert os.environ["HF_HUB_OFFLINE"] == os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
assert sys.argv[1:5] == ["-P", "-m", "accelerate.commands.accelerate_cli", "launch"], sys.argv
shutil.copy(request, {kept!r})
rows = {rows!r}
if rows is not None:
    pathlib.Path(result).write_text(json.dumps(rows))
print("the last line")
sys.exit({code})
"""


def row(name: str, good: bool) -> dict[str, object]:
    return {"name": name, "good": good, "detail": f"found {name}", "fix": f"mend {name}"}


GOOD = [row("interpreter", True), row("device", True), row("trainer's modules", True)]


@pytest.fixture
def generation(small: Small) -> Generation:
    made = Generation(Installation(small.settings.home).generations / "one")
    made.path.mkdir(parents=True)
    return made


def probe(generation: Generation, rows: list[dict[str, object]] | None, code: int = 0) -> None:
    kept = str(generation.path / "kept.json")
    stand_in_python(
        generation, PROBE.format(script=str(PROBES / "smoke.py"), kept=kept, rows=rows, code=code)
    )


def test_every_check_of_the_probe_is_a_row_and_the_device_is_named(
    small: Small, generation: Generation
) -> None:
    probe(generation, GOOD)
    report = smoke_check.run(small.settings, generation)
    assert report.ok
    assert report.title == "Smoke check"
    assert report.extra["seconds"] == round(report.extra["seconds"], 1)
    assert isinstance(report.extra["seconds"], float)
    assert [(check.name, check.detail) for check in report.checks] == [
        (each["name"], each["detail"]) for each in GOOD
    ]
    assert report.extra["device"] == expected_device()
    assert not (generation.path / "smoke").exists()


@pytest.mark.parametrize("name", ["device", "trainer's modules", "interpreter"])
def test_a_check_that_fails_fails_the_whole_and_no_device_is_named(
    name: str, small: Small, generation: Generation
) -> None:
    probe(generation, [each if each["name"] != name else row(name, False) for each in GOOD])
    report = smoke_check.run(small.settings, generation)
    assert {each: check.fix for each, check in failed(report).items()} == {name: f"mend {name}"}
    assert report.extra["device"] is None


@pytest.mark.parametrize(
    ("rows", "code"), [(GOOD, 1), (GOOD, 134), (None, 0), (None, 1)], ids=str
)  # fmt: skip
def test_a_probe_that_exits_with_an_error_or_leaves_no_result_fails(
    rows: list[dict[str, object]] | None, code: int, small: Small, generation: Generation
) -> None:
    probe(generation, rows, code)
    report = smoke_check.run(small.settings, generation)
    assert report.title == "Smoke check"
    assert [(check.name, check.status) for check in report.checks] == [("start", Status.FAIL)]
    assert "invoke setup" in report.checks[0].fix
    assert report.checks[0].detail == f"the probe exited with {code}: the last line"
    assert report.extra["device"] is None
    assert not (generation.path / "smoke").exists()


def test_a_result_that_a_killed_run_left_is_not_taken_for_this_ones(
    small: Small, generation: Generation
) -> None:
    (generation.path / "smoke").mkdir()
    (generation.path / "smoke" / "result.json").write_text(json.dumps(GOOD))
    probe(generation, None)
    assert not smoke_check.run(small.settings, generation).ok


@pytest.mark.parametrize("gui", [False, True])
def test_the_probe_checks_against_the_lock_the_profile_and_the_configuration(
    gui: bool, small: Small, generation: Generation
) -> None:
    small.lock.write_text(
        small.lock.read_text().replace("other_thing==2.1", "other_thing==2.1 ; sys_platform != 'nowhere'")
    )
    small.lock.with_name("small-gui.txt").write_text(
        small.lock.read_text().replace("plain==1.0", "plain==2.0")
    )
    generation.complete(Manifest("small", "", PYTHON, "", Inventory({}, (), "", 0, ()), 1.0, gui))
    probe(generation, GOOD)
    smoke_check.run(small.settings, generation)
    request = json.loads((generation.path / "kept.json").read_text())
    modules = request.pop("modules")
    assert {"torch", "accelerate"} <= set(modules)
    assert (set(load_gui().modules) <= set(modules)) is gui
    assert request == {
        "python": PYTHON,
        "versions": {"plain": "2.0" if gui else "1.0", "other-thing": "2.1"},
        "forbidden": list(small.settings.profile.forbidden_here()),
        "prefix": str(generation.venv),
        "device": expected_device(),
        "mixed_precision": "no",
        "config_file": str(generation.accelerate_config),
    }
