"""Base models on the disk: format, family, size, and damage."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kohya_mps.diagnose.base_model import Form, Model, inspect
from tests.support.world import World


def look(path: Path) -> Model:
    return inspect(str(path), path)


def safetensors(path: Path, shapes: dict[str, list[int]], more: int = 0, **header: Any) -> Path:
    """A file with float32 tensors of these shapes, and ``more`` bytes than they need."""
    entries, end = dict(header), 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end + more))
    return path


def whole(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["cond_stage_model.transformer.a"], "sd15"),
        (["cond_stage_model.model.a"], "sd2"),
        (["conditioner.embedders.1.a", "cond_stage_model.transformer.a"], "sdxl"),
        (["model.diffusion_model.joint_blocks.a"], "sd3"),
        (["double_blocks.0"], "flux"),
        (["model.diffusion_model.double_blocks.0"], "flux"),
        (["lora_unet_a"], ""),
        ([], ""),
    ],
)
def test_the_family_is_recognized_by_the_tensors_names(keys: list[str], family: str, tmp_path: Path) -> None:
    model = look(safetensors(tmp_path / "a.safetensors", {key: [1] for key in keys}))

    assert (model.form, model.family) == (Form.SAFETENSORS, family)


def test_the_numbers_of_each_part_are_counted(tmp_path: Path) -> None:
    shapes = {
        "model.diffusion_model.a": [3, 4],
        "model.diffusion_model.b": [5],
        "first_stage_model.a": [],
        "cond_stage_model.transformer.a": [2, 2, 2],
        "conditioner.a": [3],
        "other": [100],
    }
    path = safetensors(tmp_path / "a.SAFETENSORS", shapes, __metadata__={"a": "b"})

    assert look(path).parameters == {"unet": 17, "vae": 1, "text_encoders": 11}
    assert look(path).detail.startswith(f"{path} (0.00 MB")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not a complete safetensors file: its header is cut off"),
        (b"1234567", "is not a complete safetensors file: its header is cut off"),
        (struct.pack("<Q", 1) + b"", "is not a complete safetensors file: its header is cut off"),
        (struct.pack("<Q", 2) + b"{", "is not a complete safetensors file: its header is cut off"),
        (struct.pack("<Q", 2**40) + b"{}", "is not a complete safetensors file: its header is cut off"),
        (whole(b"no"), "is not a safetensors file: its header cannot be read"),
        (whole(b"[]"), "is not a safetensors file: its header cannot be read"),
        (whole(b'{"a": 1}'), "is not a safetensors file: its header cannot be read"),
        (whole(b'{"a":{}}'), "is not a safetensors file: its header cannot be read"),
        (
            whole(b'{"a": {"shape": 5, "data_offsets": [0, 0]}}'),
            "is not a safetensors file: its header cannot be read",
        ),
        (
            whole(b'{"a": {"shape": [1], "data_offsets": [0]}}'),
            "is not a safetensors file: its header cannot be read",
        ),
        (whole(b"[" * 9000), "is not a safetensors file: its header cannot be read"),
    ],
)
def test_a_damaged_file_is_described(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)

    assert look(path) == Model(Form.DAMAGED, f"{path} {reason}")


def test_an_empty_header_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")

    assert look(path).form is Form.SAFETENSORS


def test_an_interrupted_download_says_how_much_is_missing(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "a.safetensors", {"a": [500_000], "b": [100_000]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1_250_000])
    short = tmp_path / "b.safetensors"
    short.write_bytes(whole[:-1])

    assert look(path).detail == f"{path} is incomplete: 1.25 MB are missing (an interrupted download?)"
    assert look(short).form is Form.DAMAGED
    assert look(safetensors(tmp_path / "c.safetensors", {"a": [5]}, more=3)).form is Form.SAFETENSORS


def diffusers(folder: Path, pipeline: str, width: int | None = None) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    safetensors(folder / "unet" / "a.safetensors", {"a": [10], "b": [5]})
    if width:
        (folder / "unet" / "config.json").write_text(json.dumps({"cross_attention_dim": width}))
    return folder


@pytest.mark.parametrize(
    ("pipeline", "width", "family"),
    [
        ("StableDiffusionXLPipeline", None, "sdxl"),
        ("FluxPipeline", None, "flux"),
        ("StableDiffusion3Pipeline", 768, "sd3"),
        ("StableDiffusionPipeline", 768, "sd15"),
        ("StableDiffusionPipeline", 1024, "sd2"),
        ("StableDiffusionPipeline", None, ""),
    ],
)
def test_a_diffusers_folder_is_recognized_by_its_pipeline(
    pipeline: str, width: int | None, family: str, tmp_path: Path
) -> None:
    model = look(diffusers(tmp_path / "m", pipeline, width))

    assert (model.form, model.family) == (Form.DIFFUSERS, family)
    assert (model.parameters, model.fp16) == ({"unet": 15}, False)
    assert model.detail == f"{tmp_path / 'm'} (diffusers)"


def test_both_text_encoders_count_and_weights_in_fp16_do_not_count_twice(tmp_path: Path) -> None:
    folder = diffusers(tmp_path / "m", "StableDiffusionXLPipeline")
    safetensors(folder / "unet" / "a.fp16.safetensors", {"a": [10], "b": [5]})
    safetensors(folder / "text_encoder" / "a.safetensors", {"a": [2]})
    safetensors(folder / "text_encoder_2" / "a.safetensors", {"a": [3]})
    safetensors(folder / "vae" / "a.safetensors", {"a": [7]})
    model = look(folder)

    assert model.parameters == {"unet": 15, "text_encoders": 5, "vae": 7}
    assert model.fp16


def test_damage_inside_a_diffusers_folder_names_the_file(tmp_path: Path) -> None:
    folder = diffusers(tmp_path / "m", "StableDiffusionPipeline")
    broken = folder / "vae" / "a.safetensors"
    broken.parent.mkdir()
    broken.write_bytes(b"")

    assert look(folder).form is Form.DAMAGED
    assert look(folder).detail.startswith(f"{broken} is not a complete")


@pytest.mark.parametrize("index", ["", "[]", "5"])
def test_a_folder_without_a_usable_index_is_no_model_unless_it_is_a_vae(index: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    if index:
        (folder / "model_index.json").write_text(index)
    assert look(folder).form is Form.DAMAGED
    assert "without model_index.json" in look(folder).detail

    (folder / "config.json").write_text("{}")
    assert look(folder) == Model(Form.DIFFUSERS, f"{folder} (diffusers)")


def test_a_checkpoint_of_pickles_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(bytes(2_500_000))

    assert look(path) == Model(Form.PICKLE, f"{path} (2.50 MB)")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("someone/Animagine-XL", "sdxl"),
        ("someone/my_xl_model", "sdxl"),
        ("someone/mysdxlmodel", "sdxl"),
        ("black-forest-labs/FLUX.1-dev", "flux"),
        ("someone/influx", ""),
        ("stabilityai/stable-diffusion-3-medium", "sd3"),
        ("stabilityai/stable-diffusion-2-1", "sd2"),
        ("runwayml/stable-diffusion-v1-5", "sd15"),
        ("someone/else", ""),
    ],
)
def test_a_repositorys_family_is_guessed_by_its_name(name: str, family: str, tmp_path: Path) -> None:
    assert inspect(name, tmp_path / name) == Model(Form.HUB, f"{name}, downloaded from Hugging Face", family)


@pytest.mark.parametrize("name", ["a", "a/b/c", "models/a.safetensors", "models/a.CKPT", "/a/b", "./a"])
def test_what_is_no_repositorys_name_is_a_missing_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    assert inspect(name, path) == Model(Form.MISSING, f"{path} does not exist")


def test_the_stand_in_of_the_tests_is_a_whole_model(tmp_path: Path) -> None:
    assert look(World.safetensors(tmp_path / "a.safetensors")).family == "sd15"
