"""Draw a picture with diffusers on this machine's device, without and with a LoRA.

usage: draw_with_lora.py ORDERS

ORDERS is JSON: ``model``, ``lora``, ``out``, ``prompt``, ``negative``, ``width``, ``height``,
``steps``, ``scale``, ``seed``, ``family`` (sdxl or another), ``precision`` (no, fp16 or bf16). Writes without.png,
with.png and result.json to ``out``: device, modules, difference (mean, of 255), seconds.

lycoris puts the LoRA onto the modules by their names. It knows sd-scripts' own LoRA and its
own kinds; diffusers' loader would need peft, which the trainer does not.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from lycoris.kohya import create_network_from_weights
from safetensors.torch import load_file

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# sd-scripts names SDXL's modules as the original files do. Blocks are numbered anew by
# diffusers, they and what is inside them are renamed here.
NAMES = {
    "_input_blocks_": "_down_blocks_",
    "_middle_block_": "_mid_block_",
    "_output_blocks_": "_up_blocks_",
    "_in_layers_2.": "_conv1.",
    "_out_layers_3.": "_conv2.",
    "_emb_layers_1.": "_time_emb_proj.",
    "_skip_connection.": "_conv_shortcut.",
    "_op.": "_conv.",
}


def load(model: str, family: str, precision: torch.dtype) -> DiffusionPipeline:
    """The base model: one file, a folder in diffusers' layout, or a name on Hugging Face."""
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    options = {} if family == "sdxl" else {"safety_checker": None}
    how = kind.from_single_file if Path(model).is_file() else kind.from_pretrained
    return how(model, torch_dtype=precision, **options)


def put_on(pipeline: DiffusionPipeline, lora: str) -> int:
    """Merge the LoRA into the pipeline; returns how many modules it changed."""
    weights = load_file(lora)
    if any("input_blocks" in name or "middle_block" in name for name in weights):
        weights = renamed(_maybe_map_sgm_blocks_to_diffusers(weights, pipeline.unet.config))
    two = getattr(pipeline, "text_encoder_2", None)
    encoders = [pipeline.text_encoder, two] if two is not None else pipeline.text_encoder
    network, _ = create_network_from_weights(
        1.0, lora, pipeline.vae, encoders, pipeline.unet, weights_sd=weights
    )
    named = {name.partition(".")[0] for name in weights}
    found = {module.lora_name for module in network.unet_loras + network.text_encoder_loras}
    if missing := named - found:
        raise SystemExit(
            f"{len(missing)} of {len(named)} modules of the LoRA are not in the base model: {min(missing)}"
        )
    network.to(pipeline.device, pipeline.unet.dtype)
    network.merge_to(encoders, pipeline.unet, weights, pipeline.unet.dtype, pipeline.device)
    return len(found)


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SDXL's modules by diffusers' names."""
    result = {}
    for name, tensor in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours) if name.startswith("lora_unet") else name  # noqa: PLW2901
        result[name] = tensor
    return result


def draw(pipeline: DiffusionPipeline, orders: dict[str, object], target: Path) -> np.ndarray:
    """One picture, from the same noise each time."""
    picture = pipeline(
        orders["prompt"],
        negative_prompt=orders["negative"] or None,
        width=orders["width"],
        height=orders["height"],
        num_inference_steps=orders["steps"],
        guidance_scale=orders["scale"],
        # On the CPU, so that every device starts from the same.
        generator=torch.Generator("cpu").manual_seed(int(str(orders["seed"]))),
    ).images[0]
    picture.save(target)
    return np.asarray(picture, dtype=np.float64)


def main() -> None:
    orders = json.loads(sys.argv[1])
    out = Path(orders["out"])
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    device = Accelerator().device
    pipeline = load(orders["model"], orders["family"], PRECISIONS[orders["precision"]]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, orders, out / "without.png")
    modules = put_on(pipeline, orders["lora"])
    changed = draw(pipeline, orders, out / "with.png")
    result = {
        "device": str(device),
        "modules": modules,
        "difference": float(np.abs(plain - changed).mean()),
        "seconds": time.monotonic() - started,
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
