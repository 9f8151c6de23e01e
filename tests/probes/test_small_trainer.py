from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kohya_mps.core.settings import PROBES
from kohya_mps.probes import small_trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    """Stands in for sd-scripts: a trainer that prints the constants of its UNets and its options."""
    library = tmp_path / "sd-scripts" / "library"
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    for name, constants in (
        ("original_unet", small_trainer.SD15),
        ("sdxl_original_unet", small_trainer.SDXL),
    ):
        (library / f"{name}.py").write_text("".join(f"{constant} = 0\nOTHER = 7\n" for constant in constants))
    script = tmp_path / "sd-scripts" / "train.py"
    script.write_text(
        "import sys\nfrom library import original_unet, sdxl_original_unet\n"
        "if __name__ == '__main__':\n"
        "    print(original_unet.TIME_EMBED_DIM, sdxl_original_unet.MODEL_CHANNELS, original_unet.OTHER)\n"
        "    print(sys.argv[1:], sys.argv[0])\n"
    )
    return script


def run(trainer: Path, *options: str) -> subprocess.CompletedProcess[str]:
    probe: list[str | Path] = [sys.executable, PROBES / "small_trainer.py", trainer, *options]
    return subprocess.run(probe, capture_output=True, text=True, check=False, cwd=trainer.parent.parent)


def test_the_trainer_runs_with_small_widths_and_its_own_options(trainer: Path) -> None:
    done = run(trainer, "--max_train_steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["128 32 7", f"['--max_train_steps', '3'] {trainer}"]


def test_an_sd_scripts_that_has_no_such_constant_is_refused_by_name(trainer: Path) -> None:
    (trainer.parent / "library" / "original_unet.py").write_text("TIME_EMBED_DIM = 0\n")
    done = run(trainer)
    assert done.returncode == 1
    assert "library/original_unet.py has no BLOCK_OUT_CHANNELS" in done.stderr
    assert done.stdout == ""
