"""Make a random model, its tokenizers and captioned images for the training step.

usage: make_model.py OUT FAMILY SIZE

FAMILY is sd15 or sdxl, SIZE is small or full (sd15 only). Everything is seeded: a machine
makes the same files each time.

    OUT/model/       diffusers layout; the full sd15 has Stable Diffusion 1.5's own shapes
    OUT/tokenizers/  byte-level CLIP tokenizers, named as sd-scripts' tokenizer cache names them
    OUT/images/      2_shapes/ with four 64 x 64 pictures and their captions

A small model's folder has the file ``made-small``. By it kohya_mps/train/start.py knows that the
trainer has to be started through small_trainer.py.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# sd-scripts' tokenizer cache: the hub's name with its slash replaced (library/strategy_base.py).
TOKENIZERS = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")
IMAGE_SIZE = 64
# Stable Diffusion's noise schedule, in both families.
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tokenizer(directory: Path) -> CLIPTokenizer:
    """A CLIP tokenizer of single bytes, without merges: 512 symbols and the two special ones."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(vocabulary)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=77
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int, inner: int) -> CLIPTextConfig:
    """The configuration of a CLIP text encoder for the byte-level vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


def make_vae(channels: tuple[int, ...], layers: int) -> AutoencoderKL:
    """A VAE with Stable Diffusion's eightfold reduction and four latent channels."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        sample_size=512,
    )


def make_sd15(tokenizer: CLIPTokenizer, full: bool) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5, full or shrunk to 15 MB."""
    width = 768 if full else 64
    layers, heads = (12, 12) if full else (2, 4)
    return StableDiffusionPipeline(
        vae=make_vae((128, 256, 512, 512), 2) if full else make_vae((32, 32, 32, 32), 1),
        text_encoder=CLIPTextModel(text_config(tokenizer, width, layers, heads, 4 * width)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280) if full else (32, 64, 64, 64),
            cross_attention_dim=width,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_small_sdxl(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with the widths that sd-scripts fixes and everything else shrunk."""
    return StableDiffusionXLPipeline(
        vae=make_vae((32, 32, 32, 32), 1),
        text_encoder=CLIPTextModel(text_config(tokenizer, 768, 12, 4, 64)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 1280, 12, 4, 64)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048,
            use_linear_projection=True,
            attention_head_dim=[1, 1, 2],
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
    )


def make_images(directory: Path) -> None:
    """Four pictures of plain shapes, each with its caption, in kohya's repeats_name layout."""
    directory.mkdir(parents=True)
    for n, (shape, colour) in enumerate(
        [("circle", "red"), ("square", "green"), ("circle", "blue"), ("square", "orange")]
    ):
        picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
        draw = ImageDraw.Draw(picture)
        box = (8 + n, 8, 48 + n, 48)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        picture.save(directory / f"{n}.png")
        (directory / f"{n}.txt").write_text(f"a {colour} {shape}\n")


def main() -> None:
    out, family, size = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.manual_seed(0)
    tokenizer = make_tokenizer(out / "tokenizers" / TOKENIZERS[0])
    if family == "sdxl":
        make_tokenizer(out / "tokenizers" / TOKENIZERS[1])
    pipeline = make_small_sdxl(tokenizer) if family == "sdxl" else make_sd15(tokenizer, size == "full")
    pipeline.save_pretrained(out / "model")
    if family == "sdxl":
        # What sd-scripts looks for when it trains in fp16 (library/sdxl_train_util.py).
        pipeline.to(dtype=torch.float16).save_pretrained(out / "model", variant="fp16")
    if size == "small":
        (out / "model" / "made-small").touch()
    make_images(out / "images" / "2_shapes")
    print(sum(parameter.numel() for parameter in pipeline.unet.parameters()))


if __name__ == "__main__":
    main()
