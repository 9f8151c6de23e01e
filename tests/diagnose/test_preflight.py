"""Preflight as a whole: real files in, a judgement and a corrected copy out."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kohya_mps.core import machine, settings
from kohya_mps.core.errors import KohyaError, UsageError
from kohya_mps.core.report import Report, Status, to_json
from kohya_mps.diagnose import preflight
from kohya_mps.diagnose.preflight import PreflightOptions
from kohya_mps.install import training_step
from kohya_mps.install.generations import Generation
from kohya_mps.trainer_config.edits import Change
from kohya_mps.trainer_config.trainer_options import TrainerOptions
from tests.support.world import World

HERE = settings.load()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def judged(file: Path, **options: Any) -> Report:
    return preflight.check(HERE, PreflightOptions(file, **{"device": "mps", **options}))


def rows(report: Report, status: Status) -> list[str]:
    return [check.name for check in report.checks if check.status is status]


def test_the_report_predicts_steps_checkpoints_and_memory(world: World) -> None:
    report = judged(world.toml(max_train_epochs=5, save_every_n_epochs=1, train_batch_size=3))

    # 1 picture 10 times in batches of 3 are 4 steps an epoch.
    assert report.extra["estimate"].steps == 20
    assert report.extra["estimate"].checkpoints == 5
    assert report.extra["estimate"].checkpoints_gb == pytest.approx(5 * 8 * 589_824 * 4 / 1e9)
    assert report.ok


@pytest.mark.parametrize("network", training_step.NETWORKS)
@pytest.mark.parametrize("optimizer", ["AdamW", "Lion", "Prodigy", "AdaFactor"])
def test_the_training_steps_own_settings_pass_clean(network: str, optimizer: str, world: World) -> None:
    model = world.root / "step"
    world.data.rename(world.root / "images")
    (model / "tokenizers").mkdir(parents=True)
    (world.root / "images").rename(model / "images")
    world.safetensors(model / "model")
    (model / "model").rename(model / "model.safetensors")
    command, _ = training_step.trainer_command(
        HERE,
        Generation(world.root / "generation"),
        world.root / "checkout",
        model,
        world.root / "run",
        training_step.TrainingStepOptions(network, optimizer),
    )
    text = shlex.join(command).replace(f"{model}/model ", f"{model}/model.safetensors ")

    report = judged(world.write("step.sh", text))

    assert rows(report, Status.FAIL) + rows(report, Status.WARN) == []
    assert report.extra["trainer"] == "train_network.py"


def test_relative_paths_begin_where_the_trainer_starts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.toml(
        train_data_dir="data", pretrained_model_name_or_path="model.safetensors", output_dir="out"
    )
    monkeypatch.chdir(world.root)

    assert judged(file).ok
    assert not judged(file, base=world.folder).ok


def test_every_set_of_a_dataset_configuration_is_judged(world: World) -> None:
    config = world.write(
        "sets.toml",
        f'[general]\ncaption_extension = ".txt"\nenable_bucket = true\n'
        f'[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "{world.folder}"\nnum_repeats = 2\n'
        f'[[datasets]]\nresolution = [32, 32]\nbatch_size = 2\n[[datasets.subsets]]\nimage_dir = "{world.folder}"\n'
        f'[[datasets.subsets]]\nimage_dir = "{world.root}/none"\n',
    )
    report = judged(world.toml(dataset_config=str(config), train_data_dir=None, resolution=None))

    assert report.extra["failures"] == ["no-pictures", "resolution"]
    assert report.extra["estimate"].pictures == 3
    assert "none (image_dir)" in next(c.detail for c in report.checks if c.name == "pictures")


def test_sdxl_is_recognized_by_the_base_model(world: World) -> None:
    world.safetensors(world.model, "sdxl")

    assert judged(world.toml()).extra["family"] == "sdxl"


def test_a_picture_that_cannot_be_read_is_named(world: World) -> None:
    (world.folder / "broken.png").write_bytes(b"\x89PNG no more")
    report = judged(world.toml())

    assert "broken.png" in next(c.detail for c in report.checks if c.name == "pictures")
    assert not report.ok


def test_the_device_is_the_machines_unless_another_is_named(world: World) -> None:
    file = world.toml(mixed_precision="bf16")

    assert preflight.check(HERE, PreflightOptions(file, device="cuda")).ok
    assert not preflight.check(HERE, PreflightOptions(file, device="mps")).ok
    assert preflight.check(HERE, PreflightOptions(file)).extra["device"] == machine.expected_device()
    with pytest.raises(UsageError, match="accepted: mps, cuda, cpu"):
        preflight.check(HERE, PreflightOptions(file, device="tpu"))


def test_a_device_that_is_not_here_is_predicted(world: World) -> None:
    other = "cuda" if machine.expected_device() == "mps" else "mps"

    assert "predicted" in judged(world.toml(), device=other).checks[0].detail


def test_flags_become_options() -> None:
    options = preflight.parse_flags("a.toml", "mps", "16", "sdxl_train_network.py", "b.toml")

    assert options == PreflightOptions(
        Path("a.toml"), device="mps", trainer="sdxl_train_network.py", memory_gb=16.0, fix=Path("b.toml")
    )
    for wrong in ("lots", "-1", "nan", "0"):
        with pytest.raises(UsageError, match="--memory"):
            preflight.parse_flags("a.toml", "", wrong, "", "")


def details(report: Report) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks if check.status is Status.PASS}


def test_a_good_training_says_what_it_will_take(world: World) -> None:
    report = judged(world.toml(max_train_steps=20, network_dim=8), memory_gb=64, device="cuda")

    assert details(report) == {
        "file": "the TOML of a trainer, Stable Diffusion 1.5, for cuda, which is not here (predicted)",
        "base model": f"{world.model} (0.00 MB)",
        "pictures": "10 an epoch, from 1 folders",
        "steps": "20 steps, about 2 epochs",
        "checkpoints": "1 files, about 0.02 GB",
        "memory": "about 0.7 GB at the peak of 64 GB (predicted)",
    }
    assert (report.title, report.summary) == (f"Preflight of {world.root / 'train.toml'} for cuda", ())


def test_what_is_not_known_has_no_row(world: World) -> None:
    text = "python flux_train_network.py --network_module networks.lora_flux --sdpa --max_train_epochs 3"
    report = judged(world.write("t.sh", text), device=machine.expected_device())
    named = {check.name for check in report.checks}

    assert not {"steps", "checkpoints", "memory"} & named
    assert "a command line, for flux_train_network.py, flux" in report.checks[0].detail


def test_another_machines_memory_is_not_this_ones(world: World) -> None:
    here, other = machine.expected_device(), "mps" if machine.expected_device() == "cpu" else "cpu"

    assert f" of {machine.memory_gb():.0f} GB" in details(judged(world.toml(), device=here))["memory"]
    assert " of " not in details(judged(world.toml(), device=other))["memory"]


def test_a_failure_replaces_the_good_row(world: World) -> None:
    report = judged(world.toml(train_data_dir="none"))

    assert [check.status for check in report.checks if check.name == "pictures"] == [Status.FAIL]


def test_what_a_file_leaves_open_is_a_warning_on_its_row(world: World) -> None:
    file = world.toml(optimizer="AdamW")
    row = judged(file).checks[0]

    assert (row.name, row.status) == ("file", Status.WARN)
    assert "silently ignore these names of the GUI: optimizer" in row.detail


def test_the_next_step_is_a_corrected_copy_and_then_its_check(world: World) -> None:
    file, out = world.toml("my train.toml", xformers=True), world.root / "good copy.toml"

    assert judged(file).summary[-1].startswith(f"`invoke preflight '{file}' --fix OUT`")
    assert judged(file, fix=out).summary[-1] == (
        f"Corrected copy: {out}. Check it:  invoke preflight '{out}'"
    )
    assert judged(world.toml(train_data_dir="none")).summary == ()


def test_the_corrected_copy_says_how_much_and_what_it_could_not(world: World) -> None:
    text = "python train_network.py --config_file c --network_module networks.lora --mixed_precision fp16"
    world.write("c.toml", "xformers = true\n")
    report = judged(world.write("t.sh", text), fix=world.root / "good.sh")
    rows = [(check.status, check.detail) for check in report.checks if check.name == "corrected copy"]

    changed = len(report.extra["changes"])
    assert changed >= 2
    assert rows == [
        (Status.PASS, f"{world.root / 'good.sh'}: {changed} settings changed"),
        (Status.WARN, "xformers could not be changed in this file"),
    ]


def test_of_two_reasons_for_a_change_the_failure_is_named(world: World) -> None:
    report = judged(world.toml(mixed_precision="fp16", resolution=512), fix=world.root / "good.toml")
    why = {change.name: change.why for change in report.extra["changes"]}

    assert why["mixed_precision"].startswith("fp16: ")
    assert why["resolution"] == "wrong-type: must be a string in quotes"


def test_failures_come_before_warnings_and_each_once(world: World) -> None:
    world.write("sets.toml", "[[datasets]]\nresolution = 32\n[[datasets]]\nresolution = 32\n")
    report = judged(
        world.toml(dataset_config="sets.toml", max_data_loader_n_workers=8, mixed_precision="fp16")
    )
    found = report.extra["failures"]
    statuses = [check.status for check in report.checks[1:] if check.status is not Status.PASS]

    assert len(found) == len(set(found))
    assert statuses == sorted(statuses)
    assert {Status.FAIL, Status.WARN} <= set(statuses)


def test_the_script_that_is_assumed_is_that_of_files_that_name_none(world: World) -> None:
    command = world.write("t.sh", "python train_network.py --sdpa --seed 1")

    assert judged(world.toml(), trainer="sdxl_train_network.py").extra["family"] == "sdxl"
    assert judged(command, trainer="sdxl_train_network.py").extra["trainer"] == "train_network.py"


@pytest.mark.upstream
@pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)
def test_kohyas_own_presets_and_examples_are_judged_or_refused(tmp_path: Path) -> None:
    checkout = tmp_path / "kohya_ss"
    git = ["git", "-C", str(checkout)]
    subprocess.run(
        ["git", "clone", "--quiet", "--no-checkout", os.environ["KOHYA_REPO_URL"], checkout], check=True
    )
    subprocess.run([*git, "checkout", "--quiet", os.environ["KOHYA_COMMIT"]], check=True)
    presets = sorted(checkout.glob("presets/**/*.json"))
    files = [
        *presets,
        *checkout.glob("test/config/*"),
        *checkout.glob("examples/**/*.*"),
        *checkout.glob("*.toml"),
    ]
    refused = []
    for file in files:
        try:
            report = judged(file, base=checkout)
        except UsageError:
            refused.append(file.name)
            continue
        saved = json.loads(file.read_text()) if file in presets else {}
        found = report.extra["failures"]
        # Spot checks of what follows from the file alone.
        assert ("xformers" in found) >= (saved.get("xformers") in (True, "xformers")), file
        assert ("8-bit-optimizer" in found) >= ("8bit" in str(saved.get("optimizer"))), file
        assert ({"fp16", "bf16"} & set(found) != set()) >= (
            saved.get("mixed_precision") in ("fp16", "bf16")
        ), file
        assert ("flux" in found) >= bool(saved.get("flux1_checkbox")), file

    assert len(presets) > 30
    assert not set(refused) & {preset.name for preset in presets}


# ---- --fix --------------------------------------------------------------------------------------

BAD = """# my cat
[model]
v2 = false   # keep this
[train]  # and this
  mixed_precision = "fp16" # half
optimizer_type = 'AdamW8bit'
network_args = [
  "conv_dim=4",  # two lines
]
xformers = true
resolution = 512
"""


def bad_toml(world: World, text: str = BAD, ending: str = "\n") -> Path:
    paths = {
        n: v for n, v in world.settings().items() if n.endswith(("_dir", "_path")) or n == "caption_extension"
    }
    more = "".join(f"{n} = {json.dumps(v)}\n" for n, v in paths.items())
    path = world.root / "bad.toml"
    path.write_bytes((text + 'network_module = "networks.lora"\n' + more).replace("\n", ending).encode())
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_corrected_toml_passes_and_keeps_the_rest_byte_for_byte(world: World, ending: str) -> None:
    file, out = bad_toml(world, ending=ending), world.root / "good.toml"
    before = file.read_bytes()
    report = judged(file, fix=out)

    assert file.read_bytes() == before
    assert not report.ok
    assert judged(out).ok
    new = out.read_bytes()
    kept = [line for line in before.splitlines(keepends=True) if line in new.splitlines(keepends=True)]
    gone = [line.strip() for line in before.splitlines(keepends=True) if line not in kept]
    assert [line.split()[0] for line in gone] == [
        b"mixed_precision",
        b"optimizer_type",
        b"xformers",
        b"resolution",
    ]
    assert b"v2 = false   # keep this" + ending.encode() in new
    assert b'  mixed_precision = "no"  # preflight: was mixed_precision = "fp16" # half; fp16: ' in new
    assert b"\n# preflight: was xformers = true; xformers: " in new
    parsed = tomllib.loads(new.decode().replace("\r\n", "\n"))
    assert parsed["sdpa"] is True
    assert parsed["train"]["resolution"] == "512"
    assert parsed["train"]["network_args"] == ["conv_dim=4"]
    for line in set(new.splitlines()) - set(before.splitlines()):
        assert b"# preflight: " in line


def test_every_change_is_in_the_json(world: World) -> None:
    report = judged(bad_toml(world), fix=world.root / "good.toml")
    changes: list[Change] = json.loads(to_json(report))["changes"]

    assert {change["name"] for change in changes} == {  # type: ignore[index]
        "mixed_precision", "optimizer_type", "xformers", "sdpa", "resolution", "max_data_loader_n_workers",
    }  # fmt: skip


def test_keys_in_other_forms_are_found_and_strings_with_lookalikes_are_not(world: World) -> None:
    text = 'train."mixed_precision" = "fp16"\nnote = """\nmixed_precision = "bf16"\n"""\n"sdpa" = true\nresolution = "512"\n'
    out = world.root / "good.toml"
    judged(bad_toml(world, text), fix=out)
    parsed = tomllib.loads(out.read_text())

    assert parsed["train"]["mixed_precision"] == "no"
    assert parsed["note"] == 'mixed_precision = "bf16"\n'


def test_the_original_and_other_files_are_never_overwritten(world: World) -> None:
    file = bad_toml(world)
    for out in (file, world.model):
        with pytest.raises(UsageError, match="not overwritten"):
            judged(file, fix=out)
    with pytest.raises(UsageError, match="is not a directory"):
        judged(file, fix=world.root / "none" / "x.toml")


def test_a_corrected_json_is_what_the_gui_reads_and_passes(world: World) -> None:
    values = {
        "LoRA_type": "Standard", "optimizer": "AdamW8bit", "mixed_precision": "fp16", "xformers": "xformers",
        "max_resolution": "512,512", "caption_extension": ".txt", "max_data_loader_n_workers": 0,
        "pretrained_model_name_or_path": str(world.model), "train_data_dir": str(world.data),
        "output_dir": str(world.root / "out"), "fp8_base": True, "network_dim": 8, "max_train_steps": 10,
    }  # fmt: skip
    file, out = world.write("gui.json", json.dumps(values, indent=2)), world.root / "good.json"
    report = judged(file, fix=out)
    new = json.loads(out.read_text())

    assert not report.ok
    assert judged(out).ok
    assert (new["xformers"], new["optimizer"], new["mixed_precision"], new["fp8_base"]) == (
        "sdpa",
        "AdamW",
        "no",
        False,
    )
    assert {n: v for n, v in new.items() if n in values and values[n] == v}.keys() == values.keys() - {
        "xformers", "optimizer", "mixed_precision", "fp8_base",
    }  # fmt: skip
    lines = out.read_text().splitlines()
    at = lines.index('  "mixed_precision": "no",')
    assert lines[at - 1].startswith('  "// mixed_precision": "preflight: was \\"fp16\\"; fp16: ')
    assert [line for line in lines if "//" not in line and line not in file.read_text().splitlines()] == [
        '  "optimizer": "AdamW",', '  "mixed_precision": "no",', '  "xformers": "sdpa",', '  "fp8_base": false,',
    ]  # fmt: skip


def test_a_corrected_command_runs_the_same_otherwise(world: World) -> None:
    text = (
        "#!/bin/sh\nMODEL='{}'\n# go\naccelerate launch --cpu train_network.py \\\n"
        '  --pretrained_model_name_or_path "$MODEL" --train_data_dir={} --output_dir {} \\\n'
        "  --network_module networks.lora --resolution 512,512 --caption_extension .txt \\\n"
        "  --mixed_precision=fp16 --xformers --optimizer_type AdamW8bit --max_data_loader_n_workers 0\n"
    ).format(world.model, world.data, world.root / "out")
    file, out = world.write("t.sh", text), world.root / "good.sh"
    judged(file, fix=out)
    new = out.read_text()

    assert judged(out).ok
    assert '--pretrained_model_name_or_path "$MODEL"' in new
    assert "# preflight: --mixed_precision=fp16 -> --mixed_precision no; fp16: " in new
    assert "--cpu " not in new.splitlines()[-5]
    assert new.startswith("#!/bin/sh\n")
    assert new.rstrip().endswith("--max_data_loader_n_workers 0 --sdpa")


# ---- Anything at all ----------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(sorted(TrainerOptions.__struct_fields__)) | st.sampled_from(
    ["LoRA_type", "optimizer", "sdxl", "epoch", "max_resolution", "additional_parameters", "flux1_checkbox"]
)
fuzz = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged_or_refused(file: Path) -> None:
    """Anything may be wrong with a file; a traceback never comes of it."""
    out = file.parent / "fixed"
    out.unlink(missing_ok=True)
    for device in ("mps", "cuda"):
        try:
            to_json(preflight.check(HERE, PreflightOptions(file, device=device, fix=out, base=file.parent)))
        except KohyaError as error:
            assert str(error)
        out.unlink(missing_ok=True)


@fuzz
@given(values=st.dictionaries(names, anything, max_size=12))
def test_any_json_is_judged_or_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(values))
    judged_or_refused(tmp_path / "a.json")


def as_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(n)} = {as_toml(v)}" for n, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    return '""' if value is None else json.dumps(value)


@fuzz
@given(values=st.dictionaries(names, anything, max_size=12))
def test_any_toml_is_judged_or_refused(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("".join(f"{n} = {as_toml(v)}\n" for n, v in values.items()))
    judged_or_refused(tmp_path / "a.toml")


@fuzz
@given(
    words=st.lists(
        st.text(max_size=12) | names.map(lambda n: f"--{n}") | st.sampled_from("\"'`\\^&|;$#\n="), max_size=25
    )
)
def test_any_command_is_judged_or_refused(words: list[str], tmp_path: Path) -> None:
    text = "accelerate launch train_network.py --sdpa " + " ".join(words)
    (tmp_path / "a.sh").write_text(text, errors="replace")
    (tmp_path / "a.ps1").write_text(text, errors="replace")
    judged_or_refused(tmp_path / "a.sh")
    judged_or_refused(tmp_path / "a.ps1")


@fuzz
@given(data=st.binary(max_size=300), name=st.sampled_from(["a.toml", "a.json", "a.sh", "a.txt", "a"]))
def test_any_bytes_are_refused_or_judged(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    judged_or_refused(tmp_path / name)


@fuzz
@given(data=st.binary(max_size=200), config=anything)
def test_any_dataset_configuration_model_and_caption(data: bytes, config: Any, tmp_path: Path) -> None:
    if not (tmp_path / "data").exists():
        World(tmp_path)
    world = World.__new__(World)
    world.root, world.data, world.folder, world.model = (
        tmp_path, tmp_path / "data", tmp_path / "data" / "10_cat", tmp_path / "model.safetensors",
    )  # fmt: skip
    world.model.write_bytes(data)
    (world.folder / "a.txt").write_bytes(data)
    (world.folder / "a.png").write_bytes(data)
    (tmp_path / "sets.json").write_text(
        json.dumps({"general": config, "datasets": [config, {"subsets": [config]}]})
    )
    judged_or_refused(world.toml("one.toml"))
    judged_or_refused(world.toml("two.toml", dataset_config=str(tmp_path / "sets.json")))


def test_bf16_is_refused_on_a_mac_whose_system_is_too_old_for_the_profile(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    latest = settings.load(profile="latest")
    options = PreflightOptions(world.toml(mixed_precision="bf16"), device="mps")
    for version, failures in (("13.6.1", ["bf16"]), ("15.1", []), ("", [])):
        monkeypatch.setattr(
            "platform.mac_ver",
            lambda version=version: (version, ("", "", ""), ""),
        )
        assert preflight.check(latest, options).extra["failures"] == failures
