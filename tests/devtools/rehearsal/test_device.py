"""The simulated device refuses what a Mac refuses, names the line, and trains as the CPU does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from devtools import sandbox
from devtools.rehearsal import matrix, operators, runner, verdict
from devtools.rehearsal.operators import Served
from devtools.rehearsal.record import Finding, Kind, Record
from devtools.rehearsal.request import Request
from devtools.rehearsal.runner import Stage, Training
from kohya_mps.core import settings
from kohya_mps.core.installation import Installation
from kohya_mps.install import generations

pytestmark = pytest.mark.environment

needs_upstream = pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)

FAULTS = settings.ROOT / "tests" / "support" / "planted_faults.py"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    isolated = sandbox.isolated(settings.load(profile="validated"))
    built = {m.profile: g for g in generations.present(Installation(isolated.home)) if (m := g.manifest())}
    generation = built.get("validated") or sandbox.ready(isolated)
    return Stage(generation, None, "no", tmp_path_factory.mktemp("rehearsal"))


class Faults:
    """What came of the planted faults."""

    def __init__(self, record: Record, ended: dict[str, Any]) -> None:
        self.record = record
        self.ended = ended

    def finding(self, fault: str) -> Finding:
        """The finding at the line that carries the fault's name."""
        lines = FAULTS.read_text().splitlines()
        number = next(n for n, line in enumerate(lines, 1) if line.endswith(f"# fault: {fault}"))
        names = (f"{FAULTS.name}:{number}", f"{FAULTS.name}:{number} (its gradient)")
        found = [one for one in self.record.findings if one.where in names]
        assert len(found) == 1, f"{fault} at {names[0]}: {self.record.findings}"
        return found[0]


def run_faults(stage: Stage, *, fallback: bool) -> Faults:
    path = stage.work / "ended.json"
    result = stage.work / "record.json"
    one = Request("faults", "mps", str(FAULTS), (str(path),), False, fallback, str(result))
    runner.run(stage, [one], jobs=1)
    return Faults(runner.result(one), json.loads(path.read_text()))


@pytest.fixture(scope="module")
def faults(stage: Stage) -> Faults:
    return run_faults(stage, fallback=False)


def test_an_operator_without_kernel_raises_and_is_named(faults: Faults) -> None:
    found = faults.finding("no kernel")

    assert faults.ended["no_kernel"].startswith(
        "NotImplementedError: The operator 'aten::linalg_qr.out' is not"
    )
    assert found.kind is Kind.MISSING
    assert found.what == "aten::linalg_qr.out"


def test_a_listed_fallback_runs_and_is_named(faults: Faults) -> None:
    found = faults.finding("listed fallback")

    assert faults.ended["listed_fallback"] == pytest.approx(8.0)
    assert (found.kind, found.what, found.raises) == (Kind.FALLBACK, "linalg_svd", "")


@pytest.mark.parametrize(
    ("function", "fault"),
    [("double_precision", "float64"), ("double_precision_from_numbers", "float64 numbers")],
)
def test_double_precision_raises_and_is_named(faults: Faults, function: str, fault: str) -> None:
    assert faults.ended[function].startswith("TypeError: Cannot convert a MPS Tensor to float64 dtype")
    assert faults.finding(fault).kind is Kind.FLOAT64


def test_a_type_that_this_torch_does_not_have_on_the_device_is_refused_and_named(faults: Faults) -> None:
    assert faults.ended["eighth_precision"].startswith(
        "TypeError: Trying to convert Float8_e4m3fn to the MPS"
    )
    assert faults.finding("float8").kind is Kind.REFUSED


@pytest.mark.parametrize(
    ("function", "fault", "text"),
    [
        ("mixed_devices", "mixed devices", "RuntimeError: Expected all tensors to be on the same device"),
        ("indexing_the_cpu", "indices", "RuntimeError: indices should be either on cpu"),
        ("cpu_generator", "generator", "RuntimeError: Expected a 'mps' device type for generator"),
    ],
)
def test_what_lies_on_two_devices_raises_and_is_named(
    faults: Faults, function: str, fault: str, text: str
) -> None:
    assert faults.ended[function].startswith(text)
    assert faults.finding(fault).kind is Kind.MIXED


@pytest.mark.parametrize(("function", "fault"), [("cuda_state", "torch.cuda"), ("to_cuda", "to cuda")])
def test_cuda_is_missing_as_on_a_mac_and_the_caller_is_named(
    faults: Faults, function: str, fault: str
) -> None:
    assert faults.ended[function] == "AssertionError: Torch not compiled with CUDA enabled"
    assert faults.finding(fault).kind is Kind.CUDA


def test_a_gradient_without_kernel_is_named_by_its_forward_line(faults: Faults) -> None:
    found = faults.finding("gradient")

    assert found.what == "aten::grid_sampler_2d_backward"
    assert found.where.endswith("(its gradient)")


def test_a_kernel_that_refuses_integers_refuses_them_here(faults: Faults) -> None:
    assert faults.ended["integers"] == "RuntimeError: MPS device does not support mm for non-float inputs"


def test_what_a_mac_accepts_is_accepted(faults: Faults) -> None:
    assert faults.ended["what_is_fine"] == pytest.approx(26.0)
    assert faults.ended["in_place_shapes"] == [[1, 3, 2], [[[0, 3], [1, 4], [2, 5]]]]
    assert faults.ended["device_of_everything"] == ["mps:0", "mps:0", "cpu"]


def test_with_the_fallback_a_missing_operator_runs_and_is_still_named(stage: Stage) -> None:
    faults = run_faults(stage, fallback=True)

    assert "NotImplementedError" not in str(faults.ended["no_kernel"])
    assert faults.finding("no kernel").raises == ""


def test_operators_that_choose_by_device_hand_over_to_kernels_that_are_there(stage: Stage) -> None:
    """The table in the simulation names kernels; each torch that there is data for has them."""
    from kohya_mps.install.accelerate_launch import probe

    script = stage.work / "by_device.py"
    root = Path(runner.__file__).parents[2]
    script.write_text(
        f"import sys; sys.path.append({str(root)!r})\n"
        "from devtools.rehearsal.simulation.device import BY_DEVICE\n"
        "print(*sorted(set(BY_DEVICE.values())))\n"
    )

    named = probe(stage.generation, script).split()

    assert named
    for version in operators.known():
        assert set(named) <= operators.load(version).kernels


@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "Prodigy", "AdaFactor"])
def test_the_built_in_training_has_the_losses_of_the_cpu(stage: Stage, optimizer: str) -> None:
    training = Training(f"lora with {optimizer}", "", ("lora", optimizer, "3"))
    pair = runner.requests(stage, training, stage.work / "one", fallback=False)

    runner.run(stage, pair, jobs=1)
    simulated, on_cpu = (runner.result(one) for one in pair)

    assert simulated.error == on_cpu.error == ""
    assert len(simulated.losses) == 3
    assert verdict.difference(simulated, on_cpu) <= verdict.TOLERANCE
    assert simulated.count(Served.KERNEL) > 40
    assert simulated.count(Served.MISSING) == simulated.count(Served.FALLBACK) == 0


def test_a_training_that_dies_says_where_its_log_is(stage: Stage) -> None:
    killed = stage.work / "killed.py"
    killed.write_text("import os\nprint('so far so good', flush=True)\nos.kill(os.getpid(), 9)\n")
    log = stage.work / "killed.log"
    one = Request("killed", "cpu", str(killed), (), False, False, str(stage.work / "none.json"), str(log))

    runner.run(stage, [one], jobs=1)

    assert str(log) in runner.result(one).error
    assert "so far so good" in log.read_text()


@pytest.fixture(scope="module")
def with_kohya(stage: Stage) -> Stage:
    chosen = settings.load(profile="validated")
    tree = sandbox.kohya_checkout(chosen)
    return msgspec.structs.replace(stage, sd_scripts=tree / "sd-scripts")


def rehearsed(stage: Stage, name: str, family: str = "sd15") -> tuple[Record, Record]:
    """One of the matrix's trainings with kohya's trainer: on the simulated device, and on the CPU."""
    known = runner.trainings()
    everything = (*matrix.combinations(known, family, thorough=True), *matrix.option_trainings(known, family))
    training = next(one for one in everything if one.name == name)
    pair = runner.requests(stage, training, stage.work / "one", fallback=False)
    runner.run(stage, pair, jobs=1)
    return runner.result(pair[0]), runner.result(pair[1])


@needs_upstream
@pytest.mark.upstream
@pytest.mark.parametrize(
    ("name", "family"),
    [("loha with Lion", "sd15"), ("saving the state", "sd15"), ("lora with AdamW", "sdxl")],
)
def test_kohyas_trainer_has_the_losses_of_the_cpu(with_kohya: Stage, name: str, family: str) -> None:
    simulated, on_cpu = rehearsed(with_kohya, name, family)

    assert simulated.error == on_cpu.error == ""
    assert verdict.difference(simulated, on_cpu) <= verdict.TOLERANCE
    assert simulated.count(Served.MISSING) == 0


@needs_upstream
@pytest.mark.upstream
@pytest.mark.parametrize(
    ("name", "error", "where"),
    [
        (
            "mixed precision fp16",
            "ValueError: fp16 mixed precision requires a GPU (not 'mps')",
            "accelerate/",
        ),
        ("validation", "AssertionError: Torch not compiled with CUDA enabled", "train_network.py:"),
        (
            "huber loss, snr schedule (default)",
            "RuntimeError: Expected all tensors to be on the same device",
            "library/train_util.py:",
        ),
    ],
)
def test_what_users_report_from_macs_is_reproduced(
    with_kohya: Stage, name: str, error: str, where: str
) -> None:
    simulated, on_cpu = rehearsed(with_kohya, name)

    assert simulated.error.startswith(error)
    assert simulated.error_at.startswith(where)
    assert not verdict.same_error(simulated, on_cpu)


@needs_upstream
@pytest.mark.upstream
def test_an_interrupted_matrix_goes_on_where_it_was(
    with_kohya: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings.load(profile="validated")
    options = matrix.MatrixOptions(("validated",), ("sd15",), 1, "lokr with SGD", thorough=True)
    first = matrix.rehearse_family(with_kohya, chosen, "sd15", options)
    requested: list[Request] = []
    monkeypatch.setattr(runner, "run", lambda _stage, requests, jobs: requested.extend(requests))

    again = matrix.rehearse_family(with_kohya, chosen, "sd15", options)

    assert again == first
    assert [cell.trains for cell in first.combinations] == [True]
    assert requested == []
