"""The files that the web page finds: its forms, our presets, and the program that starts trainings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.installation import Installation
from kohya_mps.core.report import Status
from kohya_mps.core.settings import GUI_PRESETS, Settings
from kohya_mps.diagnose import preflight
from kohya_mps.gui import page_files
from kohya_mps.install import checkout, uninstall
from tests.support.installs import make_settings
from tests.support.web_pages import generation_of
from tests.support.world import World


def test_the_pages_accelerate_launches_with_our_configuration(installation: Settings) -> None:
    generation = generation_of(installation)
    directory = page_files.write_accelerate(Installation(installation.home), generation)
    given = ["launch", "--mixed_precision", "no", "a script.py", "--config_file", "with 'quotes'.toml"]
    done = subprocess.run([directory / "accelerate", *given], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        *("launch", "--config_file", str(generation.accelerate_config)),
        *given[1:],
    ]
    other = subprocess.run([directory / "accelerate", "env"], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == ["env"]


def test_the_forms_open_with_the_precision_of_the_launch_and_the_values_of_the_configuration(
    installation: Settings,
) -> None:
    chosen = settings.load_gui()
    path = page_files.write_forms(Installation(installation.home), generation_of(installation), chosen)
    forms = tomllib.loads(path.read_text(encoding="utf-8"))
    assert forms["accelerate_launch"]["mixed_precision"] == "bf16"
    assert forms["folders"]["output_dir"] == str(installation.home / "outputs")
    assert forms["basic"]["optimizer"] == "AdamW"
    assert forms["advanced"]["xformers"] == "sdpa"
    assert forms["advanced"]["max_data_loader_n_workers"] == 0
    assert not path.is_relative_to(installation.home / "kohya_gui")


def test_values_of_every_kind_survive_toml() -> None:
    values = {"text": 'a "quoted" \\ path/ß/日本/🙂\n', "yes": True, "whole": -3, "part": 1e-4, "none": ""}
    assert tomllib.loads(page_files.toml({"section": values})) == {"section": values}


def test_the_users_own_presets_stay_and_ours_are_linked(installation: Settings) -> None:
    directory = installation.home / page_files.USER_PRESETS
    directory.mkdir(parents=True)
    names = sorted(preset.name for preset in GUI_PRESETS.glob("*.json"))
    (directory / names[0]).write_text("mine")
    page_files.offer_presets(Installation(installation.home))
    page_files.offer_presets(Installation(installation.home))
    assert (directory / names[0]).read_text() == "mine"
    assert (directory / names[1]).read_bytes() == (GUI_PRESETS / names[1]).read_bytes()
    assert sorted(entry.name for entry in directory.iterdir()) == names


def test_files_that_the_page_writes_into_the_checkout_are_not_the_users(installation: Settings) -> None:
    root = installation.home
    (root / ".gitignore").write_text("presets/*/user_presets/*\nsetup.log\noutputs\n")
    subprocess.run(["git", "-C", root, "add", "kohya_gui.py", ".gitignore"], check=True)
    subprocess.run(["git", "-C", root, "commit", "--quiet", "-m", "upstream"], check=True)
    page_files.offer_presets(Installation(root))
    (root / "setup.log").write_text("said")
    (root / "outputs").mkdir()
    (root / "outputs" / "mine.safetensors").write_text("mine")
    (root / page_files.USER_PRESETS / "mine.json").write_text("{}")
    found = [name for name in uninstall.user_files(Installation(root)) if not name.startswith("branch")]
    assert sorted(found) == ["outputs/mine.safetensors", f"{page_files.USER_PRESETS}/mine.json"]


@pytest.mark.parametrize("preset", sorted(GUI_PRESETS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("profile", settings.profile_names())
def test_a_preset_is_sound_on_mps(preset: Path, profile: str, tmp_path: Path) -> None:
    world = World(tmp_path)
    world.picture(world.folder / "a.png", (1024, 1024))
    world.safetensors(world.model, "sdxl" if json.loads(preset.read_text())["sdxl"] else "sd15")
    files = {
        "pretrained_model_name_or_path": str(world.model),
        "train_data_dir": str(world.data),
        "output_dir": str(tmp_path / "out"),
    }
    saved = world.write("saved.json", json.dumps({**json.loads(preset.read_text()), **files}))
    question = preflight.PreflightOptions(saved, device="mps", memory_gb=32)
    chosen = make_settings(tmp_path / "home", profile=settings.load_profile(profile))
    judged = preflight.check(chosen, question)
    wrong = [check.detail for check in judged.checks if check.status in (Status.FAIL, Status.WARN)]
    assert not wrong


@pytest.mark.upstream
@pytest.mark.skipif(
    not (os.environ.get("KOHYA_REPO_URL") and os.environ.get("KOHYA_COMMIT")),
    reason="KOHYA_REPO_URL and KOHYA_COMMIT do not name a real kohya_ss",
)
def test_forms_and_presets_use_names_that_the_page_knows(tmp_path: Path) -> None:
    chosen = msgspec.structs.replace(settings.load(), home=tmp_path / "home")
    checkout.clone(chosen)
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [chosen.home / "kohya_gui.py", *(chosen.home / "kohya_gui").glob("*.py")]
    )
    known = set(re.findall(r'"([a-z0-9_]+\.[a-z0-9_]+)"', source))
    forms = {f"{section}.{key}" for section, values in settings.load_gui().forms.items() for key in values}
    assert forms <= known
    saved = (chosen.home / "kohya_gui" / "lora_gui.py").read_text(encoding="utf-8")
    fields = set(re.findall(r"^    (\w+),$", saved.partition("def save_configuration(")[2], re.MULTILINE))
    for preset in GUI_PRESETS.glob("*.json"):
        assert json.loads(preset.read_text()).keys() <= fields
