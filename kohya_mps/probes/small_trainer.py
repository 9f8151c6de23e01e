"""Run an unchanged sd-scripts trainer on the shrunk models that make_model.py makes.

usage: small_trainer.py TRAINER.py [TRAINER OPTIONS]

sd-scripts builds the UNet from constants in its own modules, not from the model's files.
These constants are set to the small model's widths before the trainer starts. Nothing else
is changed.
"""

import importlib
import runpy
import sys
from pathlib import Path

# library/original_unet.py and library/sdxl_original_unet.py of sd-scripts.
SD15 = {"BLOCK_OUT_CHANNELS": (32, 64, 64, 64), "TIMESTEP_INPUT_DIM": 32, "TIME_EMBED_DIM": 128}
SDXL = {"MODEL_CHANNELS": 32, "TIME_EMBED_DIM": 128}


def shrink() -> None:
    """Set the constants of both UNets; the trainer's folder has to be on ``sys.path``."""
    for name, constants in (("original_unet", SD15), ("sdxl_original_unet", SDXL)):
        module = importlib.import_module(f"library.{name}")
        for constant, value in constants.items():
            if not hasattr(module, constant):
                raise SystemExit(
                    f"library/{name}.py has no {constant}: this version of sd-scripts is not supported"
                )
            setattr(module, constant, value)


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    shrink()
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
