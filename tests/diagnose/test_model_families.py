"""The sizes of the model families, against figures that were counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.diagnose.model_families import PATH, Curve, families


def test_attention_that_is_not_fused_grows_with_the_square_of_the_area() -> None:
    curve = Curve(linear=2.0, square=3.0)
    assert curve.gigabytes(4.0, attention_is_fused=True) == 8.0
    assert curve.gigabytes(4.0, attention_is_fused=False) == 8.0 + 48.0


@pytest.mark.parametrize("key", ["sd15", "sd2", "sdxl"])
def test_each_family_is_found_by_its_own_key(key: str) -> None:
    found = families().get(key)
    assert found is not None
    assert found == getattr(families(), key)


@pytest.mark.parametrize("key", ["flux", "sd3", ""])
def test_a_family_of_unknown_size_is_none(key: str) -> None:
    assert families().get(key) is None


def test_a_misspelt_figure_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(PATH.read_text(encoding="utf-8").replace("vae_encode_gb", "vae_gb"), encoding="utf-8")
    with pytest.raises(UsageError, match="vae_gb") as caught:
        families(path)
    assert str(path) in caught.value.what


@pytest.mark.parametrize(
    ("family", "size", "checkpointing", "counted"),
    [
        # One step on torch's meta device, attention by the math path: gigabytes beside the weights.
        ("sd15", 256, False, 0.696), ("sd15", 512, False, 5.710), ("sd15", 768, False, 23.909),
        ("sd15", 256, True, 0.151), ("sd15", 512, True, 1.808), ("sd15", 768, True, 8.596),
        ("sdxl", 512, False, 4.274), ("sdxl", 768, False, 11.615), ("sdxl", 1024, False, 26.088),
        ("sdxl", 512, True, 0.422), ("sdxl", 768, True, 1.249), ("sdxl", 1024, True, 3.100),
    ],
)  # fmt: skip
def test_a_steps_memory_is_what_was_counted(
    family: str, size: int, checkpointing: bool, counted: float
) -> None:
    known = families().get(family)
    assert known is not None
    curve = known.checkpointed_gb if checkpointing else known.step_gb

    assert curve.gigabytes(size * size / 512**2, False) == pytest.approx(counted, rel=0.03, abs=0.01)
