from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kohya_mps.install import accelerate_launch
from kohya_mps.install.generations import Generation
from tests.support.installs import stand_in_python

ECHO = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "environ": dict(os.environ)}))
"""


@pytest.fixture
def generation(tmp_path: Path) -> Generation:
    made = Generation(tmp_path / "it's a $(generation)")
    stand_in_python(made, ECHO)
    return made


def test_a_script_is_launched_with_our_configuration_before_its_own_arguments(
    generation: Generation, tmp_path: Path
) -> None:
    assert accelerate_launch.argv(generation, "train.py", "--config_file", "mine.toml") == [
        str(generation.python),
        *("-P", "-m", "accelerate.commands.accelerate_cli", "launch"),
        *("--config_file", str(generation.accelerate_config)),
        *("train.py", "--config_file", "mine.toml"),
    ]
    other = accelerate_launch.argv(generation, tmp_path / "train.py", config=tmp_path / "several.yaml")
    assert other[-3:] == ["--config_file", str(tmp_path / "several.yaml"), str(tmp_path / "train.py")]


def test_the_fallback_of_mps_is_set_before_python_starts_and_nothing_leaks_in(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    variables = accelerate_launch.environ(generation)
    assert variables["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
    assert variables["PATH"].split(os.pathsep)[0] == str(generation.venv / "bin")
    assert (
        not {"PYTHONPATH", "ACCELERATE_USE_CPU", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & variables.keys()
    )
    offline = accelerate_launch.environ(generation, offline=True)
    assert (offline["HF_HUB_OFFLINE"], offline["TRANSFORMERS_OFFLINE"]) == ("1", "1")


def test_a_probe_runs_offline_with_its_arguments_and_further_variables(generation: Generation) -> None:
    printed = accelerate_launch.probe(
        generation, Path("probe.py"), "a b", "$(c)", extra={"FURTHER": "1", "HF_HUB_OFFLINE": "0"}
    )
    found = json.loads(printed)
    assert found["argv"] == ["probe.py", "a b", "$(c)"]
    assert found["environ"]["FURTHER"] == "1"
    assert found["environ"]["HF_HUB_OFFLINE"] == "0"
    assert found["environ"]["TRANSFORMERS_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import sys; print('why', file=sys.stderr); sys.exit('no torch')", "probe.py: no torch"),
        ("import sys; sys.exit(3)", "probe.py: exited with 3"),
    ],
)
def test_a_probe_that_fails_is_an_error_with_its_last_line(
    source: str, message: str, generation: Generation
) -> None:
    stand_in_python(generation, source)
    with pytest.raises(accelerate_launch.ProbeFailed) as caught:
        accelerate_launch.probe(generation, Path("/somewhere/probe.py"))
    assert str(caught.value) == message
