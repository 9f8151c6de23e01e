"""How large the families of base models are: ``config/models.yaml``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from kohya_mps.core.settings import CONFIG, read_yaml

PATH = CONFIG / "models.yaml"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Curve(_Strict, frozen=True):
    """Gigabytes for one picture: ``linear`` times its area plus ``square`` times its area squared.

    The unit of the area is 512 by 512 pixels. The squared part is attention's.
    """

    linear: float
    square: float

    def gigabytes(self, area: float, attention_is_fused: bool) -> float:
        """For a picture of this area. Fused attention never stores the squared part."""
        return self.linear * area + (0.0 if attention_is_fused else self.square * area * area)


class Family(_Strict, frozen=True):
    """A family of base models: the parameters of its parts, and the memory of a training step.

    ``lora_…`` are trained parameters for each unit of ``network_dim`` or ``conv_dim``.
    """

    name: str
    unet: int
    text_encoders: int
    vae: int
    lora_unet: int
    lora_text_encoders: int
    lora_conv: int
    step_gb: Curve
    checkpointed_gb: Curve


class Families(_Strict, frozen=True):
    """``config/models.yaml``."""

    sd15: Family
    sd2: Family
    sdxl: Family
    vae_encode_gb: float
    trainer_gb: float

    def get(self, name: str) -> Family | None:
        """A family by its key; None if its sizes are not known."""
        return {"sd15": self.sd15, "sd2": self.sd2, "sdxl": self.sdxl}.get(name)


@cache
def families(path: Path = PATH) -> Families:
    """The sizes of all families, read once."""
    return read_yaml(path, Families)
