"""``invoke test-lora``: what is drawn, and when a LoRA counts as one that changes something."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.machine import expected_device
from kohya_mps.core.report import Check, Status
from kohya_mps.core.settings import Settings
from kohya_mps.train import compare_lora
from kohya_mps.train.compare_lora import Drawn, Prompt
from kohya_mps.train.runs import Run
from tests.support.reports import failed
from tests.support.stand_in_trainer import write_interpreter
from tests.support.training_runs import killed_process, made

# Any bytes will do: the report shows pictures without reading them.
PICTURE = b"a picture"

PROBE = """#!{python}
import json, sys
from pathlib import Path
assert sys.argv[1].endswith("draw_with_lora.py")
request = json.loads(sys.argv[2])
out = Path(request["out"])
out.mkdir()
(out / "request.json").write_text(sys.argv[2])
{then}
for name in ("without.png", "with.png"):
    (out / name).write_bytes({picture!r})
result = {{"device": "{device}", "modules": {modules}, "difference": {difference}, "seconds": 1.0}}
(out / "result.json").write_text(json.dumps(result))
"""


def stand_in(
    settings: Settings, *, device: str = "", modules: int = 3, difference: float = 5.0, then: str = ""
) -> None:
    program = PROBE.format(
        python=sys.executable, device=device or expected_device(), modules=modules, difference=difference,
        picture=PICTURE, then=then,
    )  # fmt: skip
    write_interpreter(settings, program)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with a LoRA and a sample prompt."""
    run = made(tmp_path, process=killed_process())
    (run.output / "cat.safetensors").write_bytes(b"lora")
    (tmp_path / "prompts.txt").write_text("a cat --n dogs --w 64 --h 96 --s 4 --l 6.5 --d 9\n")
    return run


def test_the_pictures_are_drawn_from_the_runs_first_prompt_and_shown_in_its_report(
    installation: Settings, run: Run
) -> None:
    stand_in(installation)

    report = compare_lora.test(installation, run.path)

    assert report.ok, report.checks
    assert report.extra["modules"] == 3
    request = json.loads((run.rendered / "request.json").read_text())
    assert request["lora"] == str(run.output / "cat.safetensors")
    assert (request["prompt"], request["negative"], request["seed"]) == ("a cat", "dogs", 9)
    assert (request["width"], request["height"], request["steps"], request["scale"]) == (64, 96, 4, 6.5)
    text = run.report.read_text()
    assert "with the LoRA" in text
    assert base64.b64encode(PICTURE).decode() in text


def test_drawing_on_another_device_is_a_failure(installation: Settings, run: Run) -> None:
    stand_in(installation, device="meta:0")

    assert set(failed(compare_lora.test(installation, run.path))) == {"device"}


def test_what_diffusers_cannot_load_is_a_failure_with_its_last_words(
    installation: Settings, run: Run
) -> None:
    stand_in(installation, then='sys.exit("3 of 9 modules of the LoRA are not in the base model")')

    with pytest.raises(StepFailed, match=r"could not draw with .*3 of 9 modules"):
        compare_lora.test(installation, run.path)


def test_a_run_without_a_lora_is_an_error(installation: Settings, tmp_path: Path) -> None:
    made(tmp_path)

    with pytest.raises(UsageError, match=r"has no LoRA yet[^$]*invoke logs"):
        compare_lora.test(installation, tmp_path)


def judged(device: str = "mps:0", modules: int = 3, difference: float = 5.0) -> dict[str, Check]:
    rows = compare_lora.judge(Drawn(device, modules, difference, 1.0), "mps", "model")
    return {check.name: check for check in rows}


@pytest.mark.parametrize(("device", "status"), [("mps:0", Status.PASS), ("cpu", Status.FAIL)])
def test_the_device_has_to_be_the_expected_one(device: str, status: Status) -> None:
    assert judged(device=device)["device"].status is status


@pytest.mark.parametrize(("modules", "status"), [(1, Status.PASS), (0, Status.FAIL)])
def test_a_lora_has_to_change_a_module(modules: int, status: Status) -> None:
    assert judged(modules=modules)["modules"].status is status


@pytest.mark.parametrize(
    ("difference", "status"),
    [(0.2, Status.PASS), (0.11, Status.PASS), (0.1, Status.FAIL), (0.0, Status.FAIL)],
)
def test_a_difference_that_rounding_can_make_is_none(difference: float, status: Status) -> None:
    assert judged(difference=difference)["difference"].status is status


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("a cat", Prompt("a cat")),
        ("a cat --w 768 --h 512", Prompt("a cat", width=768, height=512)),
        ("a cat --n blurry, dark", Prompt("a cat", negative="blurry, dark")),
        ("a cat --s 8 --l 7 --d 42", Prompt("a cat", steps=8, scale=7.0, seed=42)),
        ("a cat --w wide --d", Prompt("a cat")),
        ("a cat --l 7.25", Prompt("a cat", scale=7.25)),
    ],
)
def test_a_line_of_a_prompt_file_is_read_as_sd_scripts_reads_it(line: str, prompt: Prompt) -> None:
    assert compare_lora.parse(line) == prompt


@pytest.mark.parametrize(
    ("setting", "precision"),
    [
        ('mixed_precision = "fp16"', "fp16"),
        ('mixed_precision = "bf16"', "bf16"),
        ('mixed_precision = "no"', "no"),
    ],
)
def test_it_is_drawn_in_the_precision_of_the_training(
    installation: Settings, run: Run, setting: str, precision: str
) -> None:
    run.settings.write_text(setting + "\n")
    stand_in(installation)

    compare_lora.test(installation, run.path)

    request = json.loads((run.rendered / "request.json").read_text())
    assert request["precision"] == precision
    assert request["prompt"] == "cat"  # no sample prompts: the LoRA's name
