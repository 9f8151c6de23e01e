from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.machine import expected_device
from kohya_mps.core.process import ProcessResult
from kohya_mps.core.report import Status
from kohya_mps.core.settings import PROBES, Settings
from kohya_mps.install import training_step
from kohya_mps.install.generations import Generation, Manifest
from kohya_mps.install.inventory import Inventory
from kohya_mps.install.training_step import TrainedLora, TrainingStepOptions, judge
from tests.support.installs import PYTHON, make_settings, stand_in_python
from tests.support.reports import detail, failed

GOOD = TrainedLora((1.25, 1.0, 0.5), 0.5, tensors=10, zero_start=4, trained=3, finite=True)
ENDED = ProcessResult(returncode=0, tail="", seconds=12.0, peak_bytes=2_000_000_000)
OPTIONS = TrainingStepOptions()

# Makes the model, trains and inspects as the real interpreter does, without doing any of it.
TRAINER = """
import os, pathlib, sys
script = pathlib.Path(sys.argv[1]).name
if script == "make_model.py":
    out = pathlib.Path(sys.argv[2])
    (out / "model").mkdir(parents=True)
    (out / "model" / "weights").write_text("random")
    (out / "kind").write_text(" ".join(sys.argv[3:]))
elif script == "inspect_run.py":
    assert sys.argv[2:] == [{run!r} + "/logs", {run!r} + "/lora.safetensors", "lora_up"], sys.argv
    print('{inspected}')
    sys.exit({inspection_exit})
else:
    assert sys.argv[1:5] == ["-P", "-m", "accelerate.commands.accelerate_cli", "launch"], sys.argv
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    print("accelerator device: {device}")
    print("it runs in", os.getcwd())
    print("with", *sys.argv[7:9])
    assert {run!r} in sys.argv
    model = next(argument for argument in sys.argv if argument.endswith("/model"))
    print("on", (pathlib.Path(model).parent / "kind").read_text())
    print("the last line")
    sys.exit({exit})
"""


def other_device() -> str:
    return "cuda" if expected_device() != "cuda" else "cpu"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "trainer.log"
    path.write_text(f"loading\naccelerator device: {expected_device()}\nsteps: 100%\n")
    return path


def test_a_training_as_it_has_to_be_passes_with_every_figure_in_the_report(log: Path) -> None:
    report = judge(ENDED, GOOD, log, OPTIONS)
    assert report.ok
    assert [check.name for check in report.checks] == [
        "trainer", "losses", "training device", "saved LoRA", "pace"
    ]  # fmt: skip
    assert {check.status for check in report.checks} == {Status.PASS}
    assert detail(report, "trainer") == f"{training_step.what_ran(OPTIONS)}: exit 0 after 12 s"
    assert detail(report, "losses") == "3 of 3 steps: 1.2500, 1.0000, 0.5000"
    assert detail(report, "saved LoRA") == "10 tensors, 3 of the 4 that start at zero were trained"
    assert detail(report, "pace") == "0.50 s per step, peak memory 2.00 GB"
    assert report.extra == {
        "trainer": training_step.what_ran(OPTIONS),
        "kohya_trainer_ran": True,
        "device": expected_device(),
        "losses": GOOD.losses,
        "seconds_per_step": 0.5,
        "peak_bytes": 2_000_000_000,
        "log": str(log),
    }


def test_the_built_in_step_says_that_kohyas_trainer_was_not_run(log: Path) -> None:
    report = judge(ENDED, GOOD, log, TrainingStepOptions(builtin=True))
    assert report.extra["kohya_trainer_ran"] is False
    assert "kohya's trainer was not run" in report.title


def test_a_training_on_another_device_fails(log: Path) -> None:
    log.write_text(f"accelerator device: {other_device()}\n")
    report = judge(ENDED, GOOD, log, OPTIONS)
    assert list(failed(report)) == ["training device"]
    assert (
        detail(report, "training device")
        == f"the trainer ran on {other_device()}, expected {expected_device()}"
    )
    assert report.extra["device"] == other_device()
    assert "invoke configure" in failed(report)["training device"].fix


def test_on_a_mac_a_training_on_the_cpu_fails_and_one_on_mps_passes(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    log.write_text("accelerator device: cpu\n")
    assert list(failed(judge(ENDED, GOOD, log, OPTIONS))) == ["training device"]
    log.write_text("accelerator device: mps\n")
    assert judge(ENDED, GOOD, log, OPTIONS).ok


def test_a_training_that_names_no_device_fails(log: Path) -> None:
    log.write_text("loading\n")
    report = judge(ENDED, GOOD, log, OPTIONS)
    assert list(failed(report)) == ["training device"]
    assert "a device it did not name" in detail(report, "training device")


@pytest.mark.parametrize(
    ("lora", "name"),
    [
        (msgspec.structs.replace(GOOD, losses=()), "losses"),
        (msgspec.structs.replace(GOOD, losses=GOOD.losses[:2]), "losses"),
        (msgspec.structs.replace(GOOD, losses=(*GOOD.losses, 0.4)), "losses"),
        (msgspec.structs.replace(GOOD, losses=(1.0, math.nan, 1.0)), "losses"),
        (msgspec.structs.replace(GOOD, losses=(1.0, 1.0, math.inf)), "losses"),
        (msgspec.structs.replace(GOOD, trained=0), "saved LoRA"),
        (msgspec.structs.replace(GOOD, trained=2), "saved LoRA"),  # half is not more than half
        (msgspec.structs.replace(GOOD, zero_start=0, trained=0), "saved LoRA"),
        (msgspec.structs.replace(GOOD, zero_start=0, trained=1), "saved LoRA"),
        (msgspec.structs.replace(GOOD, finite=False), "saved LoRA"),
    ],
)
def test_a_training_that_did_not_train_fails(lora: TrainedLora, name: str, log: Path) -> None:
    report = judge(ENDED, lora, log, OPTIONS)
    assert list(failed(report)) == [name]
    assert (str(log) if name == "losses" else "the optimizer") in failed(report)[name].fix


def test_one_trained_weight_of_one_is_enough(log: Path) -> None:
    assert judge(ENDED, msgspec.structs.replace(GOOD, zero_start=1, trained=1), log, OPTIONS).ok


def test_a_single_step_has_no_pace(log: Path) -> None:
    lora = msgspec.structs.replace(GOOD, seconds_per_step=None)
    assert detail(judge(ENDED, lora, log, OPTIONS), "pace") == "peak memory 2.00 GB"


@pytest.mark.parametrize(
    ("line", "device"),
    [
        ("accelerator device: mps", "mps"),
        ("accelerator device: cuda:0", "cuda"),
        ("accelerator device:cpu", "cpu"),
        ("the accelerator device: mps", None),
        ("", None),
    ],
)
def test_the_device_is_read_from_the_trainers_own_line(line: str, device: str | None, log: Path) -> None:
    log.write_bytes(b"\xff\xfe noise\r\n" + line.encode() + b"\n")
    assert training_step.named_device(log) == device


# -- The whole step, with a stand-in for the trainer's interpreter ------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return make_settings(tmp_path / "home")


@pytest.fixture
def generation(settings: Settings) -> Generation:
    return Generation(settings.home / "generation")


def trainer(
    generation: Generation,
    *,
    code: int = 0,
    device: str = "",
    inspected: str = json.dumps(msgspec.to_builtins(GOOD)),
    inspection: int = 0,
) -> None:
    stand_in_python(
        generation,
        TRAINER.format(
            device=device or expected_device(),
            exit=code,
            inspected=inspected,
            inspection_exit=inspection,
            run=str(generation.path.parents[1] / "work" / "run"),
        ),
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    scripts = tmp_path / "kohya_ss" / "sd-scripts"
    scripts.mkdir(parents=True)
    (scripts / "train_network.py").touch()
    return scripts.parent


def test_the_trainer_is_run_and_judged(
    settings: Settings,
    generation: Generation,
    checkout: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trainer(generation)
    report = training_step.run(settings, generation, checkout, tmp_path / "work", OPTIONS)
    assert report.ok
    log = Path(report.extra["log"])
    assert log == tmp_path / "work" / "run" / "trainer.log"
    scripts = checkout / "sd-scripts"
    assert log.read_text().splitlines()[1:] == [
        f"it runs in {scripts}",
        f"with {PROBES / 'small_trainer.py'} {scripts / 'train_network.py'}",
        "on sd15 small",
        "the last line",
    ]
    assert "the last line" not in capfd.readouterr().err, "only the progress is shown"
    trainer(generation, device=other_device())
    report = training_step.run(settings, generation, checkout, tmp_path / "work", OPTIONS)
    assert list(failed(report)) == ["training device"]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_a_trainer_that_exits_with_an_error_fails_with_its_last_line(
    code: int, settings: Settings, generation: Generation, checkout: Path, tmp_path: Path
) -> None:
    trainer(generation, code=code)
    report = training_step.run(settings, generation, checkout, tmp_path / "work", OPTIONS)
    assert {name: check.detail for name, check in failed(report).items()} == {
        "trainer": f"exited with {code}: the last line"
    }
    what = training_step.what_ran(OPTIONS)
    assert report.title == f"Training step: {what}"
    assert report.extra == {"trainer": what, "log": str(tmp_path / "work" / "run" / "trainer.log")}
    assert report.extra["log"] in report.checks[0].fix


def test_a_training_that_left_no_readable_lora_fails(
    settings: Settings, generation: Generation, checkout: Path, tmp_path: Path
) -> None:
    trainer(generation, inspected="no such file: lora.safetensors", inspection=1)
    with pytest.raises(StepFailed, match="exited with 0, but its LoRA or its log cannot be read"):
        training_step.run(settings, generation, checkout, tmp_path / "work", OPTIONS)


@pytest.mark.parametrize("there", [None, "no checkout"])
def test_without_a_checkout_only_the_built_in_step_trains(
    there: str | None, settings: Settings, generation: Generation, tmp_path: Path
) -> None:
    trainer(generation)
    checkout = tmp_path / there if there else None
    with pytest.raises(UsageError, match="no kohya_ss checkout") as caught:
        training_step.run(settings, generation, checkout, tmp_path / "work", OPTIONS)
    assert "--builtin" in caught.value.fix
    builtin = TrainingStepOptions(builtin=True)
    report = training_step.run(settings, generation, checkout, tmp_path / "work", builtin)
    assert report.ok
    assert report.extra["kohya_trainer_ran"] is False


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        (TrainingStepOptions(network="no-such"), "no network 'no-such'", "accepted: lora, locon, loha, lokr"),
        (TrainingStepOptions(full=True, builtin=True), "small model only", "leave out --full or --builtin"),
    ],
)
def test_a_combination_that_does_not_exist_is_refused(
    options: TrainingStepOptions, message: str, fix: str
) -> None:
    with pytest.raises(UsageError, match=message) as told:
        options.check()
    assert told.value.fix == fix


def test_a_model_is_made_once_and_again_when_a_file_of_it_is_damaged(
    generation: Generation, tmp_path: Path
) -> None:
    trainer(generation)
    model = training_step.prepare_model(generation, tmp_path, "sd15", "small")
    assert model.parent == tmp_path / "models"
    assert model.name.startswith("sd15-small-")
    assert (model / "kind").read_text() == "sd15 small"
    weights = model / "model" / "weights"
    weights.chmod(0o600)
    assert training_step.prepare_model(generation, tmp_path, "sd15", "small") == model
    assert weights.stat().st_mode & 0o777 == 0o600, "it was made again"
    weights.write_text("damage")
    assert training_step.prepare_model(generation, tmp_path, "sd15", "small") == model
    assert weights.read_text() == "random"
    weights.unlink()
    training_step.prepare_model(generation, tmp_path, "sd15", "small")
    assert weights.read_text() == "random"
    (model / "digests.json").write_text("[]")
    training_step.prepare_model(generation, tmp_path, "sd15", "small")
    assert "weights" in (model / "digests.json").read_text()


@pytest.mark.parametrize("begun", ["pathlib.Path(sys.argv[2]).mkdir(parents=True)", ""])
def test_a_model_that_cannot_be_made_leaves_no_part_of_it(
    begun: str, generation: Generation, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    stand_in_python(generation, f"import pathlib, sys\n{begun}\nsys.exit('no torch')")
    with pytest.raises(StepFailed, match="no torch") as caught:
        training_step.prepare_model(generation, tmp_path, "sd15", "small")
    assert "invoke setup" in caught.value.fix
    assert list((tmp_path / "models").iterdir()) == []


def test_another_lock_makes_another_model_in_place_of_the_old_one(
    generation: Generation, tmp_path: Path
) -> None:
    trainer(generation)
    other_size = training_step.prepare_model(generation, tmp_path, "sd15", "full")
    old = training_step.prepare_model(generation, tmp_path, "sd15", "small")
    generation.complete(Manifest("small", "another", PYTHON, "", Inventory({}, (), "", 0, ()), 1.0))
    new = training_step.prepare_model(generation, tmp_path, "sd15", "small")
    assert new != old
    assert sorted((tmp_path / "models").iterdir()) == sorted([new, other_size])


def test_a_full_size_model_is_not_kept(
    settings: Settings, generation: Generation, checkout: Path, tmp_path: Path
) -> None:
    trainer(generation)
    work = tmp_path / "work"
    report = training_step.run(settings, generation, checkout, work, TrainingStepOptions(full=True))
    assert report.ok
    said = Path(report.extra["log"]).read_text()
    assert f"with {checkout / 'sd-scripts' / 'train_network.py'} --pretrained" in said, "not by the small one"
    assert "on sd15 full" in said
    assert list((work / "models").iterdir()) == []


@pytest.mark.parametrize("network", training_step.NETWORKS)
def test_sd_scripts_own_network_gets_no_algorithm_and_lycoris_gets_one(network: str) -> None:
    arguments = training_step.NETWORKS[network].arguments()
    assert arguments[:1] == ["--network_module"]
    assert ("--network_args" in arguments) is (network != "lora")
    if network != "lora":
        assert arguments[1:] == [
            "lycoris.kohya",
            "--network_args",
            f"algo={training_step.NETWORKS[network].algorithm}",
        ]


def test_the_trainer_gets_the_precision_the_steps_and_the_optimizers_rate(tmp_path: Path) -> None:
    def value(arguments: list[str], option: str) -> str:
        return arguments[arguments.index(option) + 1]

    adam = training_step.trainer_arguments("bf16", tmp_path, tmp_path, OPTIONS)
    assert value(adam, "--mixed_precision") == "bf16"
    assert value(adam, "--max_train_steps") == str(training_step.STEPS)
    assert value(adam, "--learning_rate") == "1e-4"
    prodigy = training_step.trainer_arguments(
        "no", tmp_path, tmp_path, TrainingStepOptions(optimizer="Prodigy")
    )
    assert value(prodigy, "--learning_rate") == "1.0"


def test_the_small_models_training_has_exactly_these_options(tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "run"
    arguments = training_step.trainer_arguments("no", model, output, OPTIONS)

    switches = ["--sdpa"]
    rest = [argument for argument in arguments if argument not in switches]
    assert len(rest) == len(arguments) - len(switches)
    assert dict(zip(rest[::2], rest[1::2], strict=True)) == {
        "--pretrained_model_name_or_path": f"{model}/model",
        "--tokenizer_cache_dir": f"{model}/tokenizers",
        "--train_data_dir": f"{model}/images",
        "--caption_extension": ".txt",
        "--resolution": "64,64",
        "--min_bucket_reso": "64",
        "--network_module": "networks.lora",
        "--network_dim": "4",
        "--network_alpha": "1",
        "--optimizer_type": "AdamW",
        "--learning_rate": "1e-4",
        "--train_batch_size": "1",
        "--max_train_steps": "3",
        "--seed": "42",
        "--mixed_precision": "no",
        "--save_precision": "float",
        "--max_data_loader_n_workers": "0",
        "--save_model_as": "safetensors",
        "--output_dir": str(output),
        "--output_name": "lora",
        "--logging_dir": f"{output}/logs",
        "--log_with": "tensorboard",
    }


def test_the_built_in_step_gets_its_model_pictures_and_algorithm(generation: Generation) -> None:
    options = TrainingStepOptions(network="lokr", optimizer="Lion", builtin=True)
    command = training_step.builtin_command(generation, Path("/model"), Path("/run"), options)
    script = command.index(str(PROBES / "builtin_step.py"))
    assert command[script + 1 :] == ["/model/model", "/model/images", "/run", "lokr", "Lion", "3"]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (OPTIONS, "kohya's train_network.py, lora with AdamW on a small random SD 1.5"),
        (
            TrainingStepOptions("loha", "Lion", full=True),
            "kohya's train_network.py, loha with Lion on a full-size random SD 1.5",
        ),
        (
            TrainingStepOptions(builtin=True),
            "the built-in step (kohya's trainer was not run), lora with AdamW on a small random SD 1.5",
        ),
    ],
)
def test_one_phrase_says_what_was_run(options: TrainingStepOptions, phrase: str) -> None:
    assert training_step.what_ran(options) == phrase


class Terminal(io.TextIOWrapper):
    """What was written to it, and that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_last_state_of_the_progress_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", Terminal(written))
    long = b"steps:  67%" + b"-" * 200
    for piece in (b"loading\n", b"steps:   0%\rsteps:  33%\rnoise\n", long, b"steps: 100%\n"):
        training_step._progress_only(piece)

    shown = [b"steps:  33%", long[:100], b"steps: 100%\n"]
    assert written.getvalue() == b"".join(b"\r      " + state for state in shown)


def test_a_pipe_sees_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written))
    training_step._progress_only(b"steps: 100%\n")
    assert written.getvalue() == b""
