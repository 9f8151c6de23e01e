"""``invoke configure --processes``: trainings in several processes, verification in one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import CONFIG, Settings
from kohya_mps.install import accelerate_config
from kohya_mps.install.accelerate_config import ProcessLayout
from kohya_mps.install.generations import Generation

# Stands in for the trainer's interpreter with the probe: writes the fields and reads them back.
PROBE = """#!{python}
import json, sys
from pathlib import Path
fields = json.loads(sys.argv[3])
Path(sys.argv[2]).write_text(json.dumps(fields))
print(json.dumps(fields | {changed}))
"""


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    Installation(tmp_path).state.mkdir()
    return msgspec.structs.replace(settings.load(), home=tmp_path)


def generation(here: Settings, changed: str = "{}") -> Generation:
    made = Generation(Installation(here.home).generations / "one")
    made.python.parent.mkdir(parents=True, exist_ok=True)
    made.python.write_text(PROBE.format(python=sys.executable, changed=changed))
    made.python.chmod(0o755)
    return made


def written(here: Settings) -> dict[str, object]:
    found: dict[str, object] = json.loads(Installation(here.home).distributed_config.read_text())
    return found


def test_several_processes_are_started_by_accelerates_own_launcher(here: Settings) -> None:
    accelerate_config.configure_distributed(here, generation(here), ProcessLayout(processes=4))

    fields = written(here)
    assert fields["distributed_type"] == "MULTI_GPU"
    assert fields["num_processes"] == 4
    assert fields["num_machines"] == 1
    assert fields["use_cpu"] is False


def test_machines_have_a_rank_and_the_address_of_the_first(here: Settings) -> None:
    accelerate_config.configure_distributed(here, generation(here), ProcessLayout(2, 3, 1, "10.0.0.1", 29600))

    fields = written(here)
    assert (fields["num_processes"], fields["num_machines"], fields["machine_rank"]) == (6, 3, 1)
    assert (fields["main_process_ip"], fields["main_process_port"]) == ("10.0.0.1", 29600)


def test_one_process_goes_back_to_the_usual(here: Settings) -> None:
    made = generation(here)
    accelerate_config.configure_distributed(here, made, ProcessLayout(processes=2))

    accelerate_config.configure_distributed(here, made, ProcessLayout(processes=1))

    assert not Installation(here.home).distributed_config.exists()


def test_the_configuration_of_the_verification_keeps_one_process(here: Settings) -> None:
    made = generation(here)
    accelerate_config.configure_distributed(here, made, ProcessLayout(processes=2))

    accelerate_config.write_own(here, made)

    assert yaml.safe_load(made.accelerate_config.read_text())["num_processes"] == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ProcessLayout(processes=0), "--processes and --machines"),
        (ProcessLayout(machines=0), "--processes and --machines"),
        (ProcessLayout(machines=2, address="a", port=0), "--main-port"),
        (ProcessLayout(machines=2, rank=2, address="a"), "--machine-rank: 2 of 2"),
        (ProcessLayout(machines=2), "--main-address"),
        (ProcessLayout(machines=2, address="a", port=70_000), "--main-port"),
    ],
)
def test_an_invalid_layout_is_refused_and_writes_no_file(
    here: Settings, layout: ProcessLayout, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        accelerate_config.configure_distributed(here, generation(here), layout)

    assert not Installation(here.home).distributed_config.exists()


def test_a_mac_trains_with_one_process(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(UsageError, match="cannot train together on MPS"):
        accelerate_config.configure_distributed(here, generation(here), ProcessLayout(processes=2))
    accelerate_config.configure_distributed(here, generation(here), ProcessLayout(processes=1))


def test_what_accelerate_reads_otherwise_is_an_error(here: Settings) -> None:
    with pytest.raises(StepFailed, match="num_processes is 1"):
        accelerate_config.configure_distributed(
            here, generation(here, '{"num_processes": 1}'), ProcessLayout(processes=2)
        )


@pytest.mark.parametrize("name", ["mps", "one-gpu", "several-gpus", "several-machines"])
def test_every_configuration_in_the_repository_keeps_the_device(name: str) -> None:
    fields = yaml.safe_load((CONFIG / "accelerate" / f"{name}.yaml").read_text())

    assert fields["use_cpu"] is False
    assert fields["mixed_precision"] == "no"
