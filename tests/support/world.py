"""Real files for preflight: pictures, captions, base models, an output folder."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from PIL import Image

GOOD: dict[str, Any] = {
    "network_module": "networks.lora",
    "network_dim": 8,
    "resolution": "512,512",
    "caption_extension": ".txt",
    "optimizer_type": "AdamW",
    "learning_rate": 1e-4,
    "max_train_steps": 20,
    "mixed_precision": "no",
    "sdpa": True,
    "gradient_checkpointing": True,
    "cache_latents": True,
    "max_data_loader_n_workers": 0,
}

KEYS = {
    "sd15": ("model.diffusion_model.a", "cond_stage_model.transformer.a", "first_stage_model.a"),
    "sdxl": ("model.diffusion_model.a", "conditioner.embedders.1.a", "first_stage_model.a"),
    "flux": ("double_blocks.0.a",),
}


class World:
    """Files in a directory, and settings that name them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.folder = self.data / "10_cat"
        self.picture(self.folder / "a.png")
        (self.folder / "a.txt").write_text("a cat\n")
        self.model = self.safetensors(root / "model.safetensors")
        (root / "out").mkdir()

    def settings(self, **changed: Any) -> dict[str, Any]:
        """Good settings, and what a test changes; None removes one."""
        merged = {
            "pretrained_model_name_or_path": str(self.model),
            "train_data_dir": str(self.data),
            "output_dir": str(self.root / "out"),
            **GOOD,
            **changed,
        }
        return {name: value for name, value in merged.items() if value is not None}

    def toml(self, name: str = "train.toml", **changed: Any) -> Path:
        path = self.root / name
        path.write_text("".join(f"{n} = {json.dumps(v)}\n" for n, v in self.settings(**changed).items()))
        return path

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.write_text(text)
        return path

    @staticmethod
    def picture(path: Path, size: tuple[int, int] = (64, 64)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "red").save(path)
        return path

    @staticmethod
    def safetensors(path: Path, family: str = "sd15", cut: int = 0) -> Path:
        """A model of the family with one number in each part, without its last ``cut`` bytes."""
        keys = KEYS[family]
        header = {
            key: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
            for at, key in enumerate(keys)
        }
        text = json.dumps(header).encode()
        whole = struct.pack("<Q", len(text)) + text + bytes(4 * len(keys))
        path.write_bytes(whole[: len(whole) - cut])
        return path
