"""Train a LoRA for a few steps without kohya_ss: accelerate, diffusers and the pinned lycoris.

usage: builtin_step.py MODEL IMAGES OUT ALGORITHM OPTIMIZER STEPS

It logs and saves what sd-scripts does, under the same names, so that the same checks apply.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import lion_pytorch
import numpy as np
import prodigyopt
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from lycoris import create_lycoris
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "Lion": lambda parameters: lion_pytorch.Lion(parameters, lr=1e-4),
    "Prodigy": lambda parameters: prodigyopt.Prodigy(parameters, lr=1.0),
    "AdaFactor": transformers.Adafactor,
}


def samples(images: Path) -> Iterator[tuple[torch.Tensor, str]]:
    """Pictures of shape (1, 3, height, width) in -1..1 with their captions, repeated without end."""
    files = sorted(images.rglob("*.png"))
    while True:
        for file in files:
            pixels = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 127.5 - 1
            yield torch.from_numpy(pixels).permute(2, 0, 1)[None], file.with_suffix(".txt").read_text()


def main() -> None:
    model, images, out = sys.argv[1:4]
    algorithm, optimizer_name, steps = sys.argv[4], sys.argv[5], int(sys.argv[6])
    if optimizer_name not in OPTIMIZERS:
        raise SystemExit(
            f"the built-in step has the optimizers {', '.join(OPTIMIZERS)}, not {optimizer_name}"
        )
    accelerator = Accelerator(log_with="tensorboard", project_dir=str(Path(out) / "logs"))
    print("accelerator device:", accelerator.device)
    set_seed(42)
    device = accelerator.device
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").to(device)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for frozen in (text_encoder, vae, unet):
        frozen.requires_grad_(False)
    network = create_lycoris(unet, 1.0, linear_dim=4, linear_alpha=1.0, algo=algorithm)
    network.apply_to()
    optimizer = OPTIMIZERS[optimizer_name](network.parameters())
    unet, network, optimizer = accelerator.prepare(unet, network, optimizer)
    network.train()
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    accelerator.init_trackers("builtin_step")
    for step, (pixels, caption) in zip(range(1, steps + 1), samples(Path(images)), strict=False):
        with torch.no_grad():
            latents = vae.encode(pixels.to(device)).latent_dist.sample() * vae.config.scaling_factor
            tokens = tokenizer(
                caption, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            )
            context = text_encoder(tokens.input_ids.to(device))[0]
        noise = torch.randn_like(latents)
        moment = torch.randint(0, schedule.config.num_train_timesteps, (1,), device=device)
        predicted = unet(schedule.add_noise(latents, noise, moment), moment, context).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss/current": loss.item()}, step=step)
        print(f"step {step}: loss {loss.item():.6f}")
    accelerator.unwrap_model(network).save_weights(str(Path(out) / "lora.safetensors"), torch.float32, {})
    accelerator.end_training()


if __name__ == "__main__":
    main()
