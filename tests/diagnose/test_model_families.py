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
