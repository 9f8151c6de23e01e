"""Draw a picture with diffusers on this machine's device, without and with a LoRA.

usage: draw_with_lora.py REQUEST

REQUEST is JSON: ``model``, ``lora``, ``out``, ``prompt``, ``negative``, ``width``, ``height``,
``steps``, ``scale``, ``seed``, ``family`` (sdxl or another one), ``precision`` (no, fp16 or bf16).
The script writes without.png, with.png and result.json to the directory ``out``: device, modules,
difference (mean, of 255), seconds.

lycoris finds the LoRA's modules by their names. It reads sd-scripts' own LoRA and its own kinds;
diffusers' loader would need peft, which the trainer's environment does not have.
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

# sd-scripts names SDXL's modules as the original files do. diffusers' own function gives the blocks
# diffusers' numbers; these are the names of the blocks and of the modules in them.
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
    load_from = kind.from_single_file if Path(model).is_file() else kind.from_pretrained
    return load_from(model, torch_dtype=precision, **options)


def merge_lora(pipeline: DiffusionPipeline, lora: str) -> int:
    """Merge the LoRA into the pipeline, and return the number of modules that it changed."""
    weights = load_file(lora)
    if any("input_blocks" in name or "middle_block" in name for name in weights):
        weights = rename(_maybe_map_sgm_blocks_to_diffusers(weights, pipeline.unet.config))
    second = getattr(pipeline, "text_encoder_2", None)
    encoders = [pipeline.text_encoder, second] if second is not None else pipeline.text_encoder
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


def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under diffusers' names of SDXL's modules."""
    result = {}
    for name, tensor in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours) if name.startswith("lora_unet") else name  # noqa: PLW2901
        result[name] = tensor
    return result


def draw(pipeline: DiffusionPipeline, request: dict[str, object], target: Path) -> np.ndarray:
    """Draw and save one picture, from the same noise each time; returns its pixels (0 to 255)."""
    picture = pipeline(
        request["prompt"],
        negative_prompt=request["negative"] or None,
        width=request["width"],
        height=request["height"],
        num_inference_steps=request["steps"],
        guidance_scale=request["scale"],
        # On the CPU, so that every device starts from the same noise.
        generator=torch.Generator("cpu").manual_seed(int(str(request["seed"]))),
    ).images[0]
    picture.save(target)
    return np.asarray(picture, dtype=np.float64)


def main() -> None:
    request = json.loads(sys.argv[1])
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    device = Accelerator().device
    pipeline = load(request["model"], request["family"], PRECISIONS[request["precision"]]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    plain = draw(pipeline, request, out / "without.png")
    modules = merge_lora(pipeline, request["lora"])
    changed = draw(pipeline, request, out / "with.png")
    result = {
        "device": str(device),
        "modules": modules,
        "difference": float(np.abs(plain - changed).mean()),
        "seconds": time.monotonic() - started,
    }
    (out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
