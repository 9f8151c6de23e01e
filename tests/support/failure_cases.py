"""For every known failure: a case that must be caught, and a near miss that must pass.

``tests/known_failures/test_catalogue.py`` fails for an entry of ``config/failures.yaml`` that
has no case for its settings, its environment or its log.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tests.support.world import World

Make = Callable[[World], Path]


class Preflight(msgspec.Struct, frozen=True):
    """A file for preflight, and its options; the device is the first of the entry unless one is named."""

    make: Make
    device: str = ""
    trainer: str = ""
    memory_gb: float | None = None
    environ: dict[str, str] = {}


class Pair(msgspec.Struct, frozen=True):
    """A case that must be caught, and one that must pass."""

    caught: Any
    passes: Any


class Cases(msgspec.Struct, frozen=True):
    """The pairs of one entry: for its settings, its environment and its log."""

    settings: Pair | None = None
    environment: Pair | None = None
    log: Pair | None = None


def toml(**changed: Any) -> Preflight:
    return Preflight(lambda world: world.toml(**changed))


def settings(caught: dict[str, Any], passes: dict[str, Any]) -> Pair:
    return Pair(toml(**caught), toml(**passes))


def files(caught: Make, passes: Make) -> Pair:
    return Pair(Preflight(caught), Preflight(passes))


def log(caught: str, passes: str) -> Pair:
    return Pair(caught, passes)


def facts(caught: dict[str, Any], passes: dict[str, Any]) -> Pair:
    return Pair(caught, passes)


def command(options: str, launch: str = "") -> Make:
    def make(world: World) -> Path:
        paths = f"--train_data_dir '{world.data}' --output_dir '{world.root / 'out'}'"
        return world.write(
            "train.sh",
            f"accelerate launch {launch} train_network.py \\\n  --pretrained_model_name_or_path "
            f"'{world.model}' {paths} \\\n  --network_module networks.lora --resolution 512,512 --sdpa "
            f"--max_data_loader_n_workers 0 --caption_extension .txt {options}\n",
        )

    return make


def _renamed_folder(world: World) -> Path:
    world.folder.rename(world.data / "cat")
    return world.toml()


def _two_folders(name: str) -> Make:
    def make(world: World) -> Path:
        world.picture(world.data / name / "b.png")
        (world.data / name / "b.txt").write_text("b")
        return world.toml()

    return make


def _cut_picture(world: World) -> Path:
    picture = world.picture(world.folder / "b.jpg", (256, 256))
    (world.folder / "b.txt").write_text("b")
    picture.write_bytes(picture.read_bytes()[:400])
    return world.toml()


def _grey_picture(world: World) -> Path:
    from PIL import Image

    Image.new("L", (64, 64)).save(world.folder / "b.jpg")
    (world.folder / "b.txt").write_text("b")
    return world.toml()


def _caption(data: bytes) -> Make:
    def make(world: World) -> Path:
        (world.folder / "a.txt").write_bytes(data)
        return world.toml()

    return make


def _model(family: str, cut: int = 0) -> Make:
    def make(world: World) -> Path:
        world.safetensors(world.model, family, cut)
        return world.toml()

    return make


def _sdxl_folder(*weights: str) -> Make:
    def make(world: World) -> Path:
        world.write("model_index.json", '{"_class_name": "StableDiffusionXLPipeline"}')
        (world.root / "unet").mkdir()
        for name in weights:
            world.safetensors(world.root / "unet" / name)
        return world.toml(pretrained_model_name_or_path=str(world.root), mixed_precision="fp16")

    return make


def _pickle(name: str) -> Make:
    def make(world: World) -> Path:
        path = world.root / name
        if name.endswith(".safetensors"):
            world.safetensors(path)
        else:
            path.write_bytes(b"PK")
        return world.toml(pretrained_model_name_or_path=str(path))

    return make


def _output_is_file(world: World) -> Path:
    return world.toml(output_dir=str(world.write("file", "")))


def _tokenizer(world: World) -> Path:
    (world.root / "tokens" / "openai_clip-vit-large-patch14").mkdir(parents=True)
    return world.toml(tokenizer_cache_dir=str(world.root / "tokens"))


OFFLINE = {"HF_HUB_OFFLINE": "1"}
SDXL = "sdxl_train_network.py"

CASES = {
    "upstream-torch-pair": Cases(
        environment=facts(
            {"upstream_pair": "torch==2.8.0.* with torchvision==0.22.*", "upstream_pair_broken": True},
            {"upstream_pair": "torch==2.8.0 with torchvision==0.23.0", "upstream_pair_broken": False},
        ),
        log=log(
            "ERROR: Could not find a version that satisfies the requirement torch==2.8.0.* (from versions: 2.2.0)",
            "Successfully installed torch==2.8.0 torchvision==0.23.0",
        ),
    ),
    "two-requirements-on-one-line": Cases(
        log=log(
            "ERROR: Invalid requirement: 'torch==2.0.0 torchvision==0.15.1': Expected end or semicolon",
            "ERROR: Invalid requirement: 'tensorflow = 2'",
        )
    ),
    "python-version": Cases(
        environment=facts({"trainer_python": "3.12.4"}, {"trainer_python": "3.11.11"}),
        log=log(
            "ERROR: Package 'x' requires a different Python: 3.12.1 not in '<3.12,>=3.10'",
            "Using Python 3.11.7 environment",
        ),
    ),
    "cuda-only-package": Cases(
        environment=facts({"forbidden": "xformers 0.0.28"}, {"package_xformers_stubs": "1"}),
        log=log(
            "ERROR: No matching distribution found for onnxruntime-gpu==1.19.2",
            "Collecting onnxruntime==1.19.2",
        ),
    ),
    "missing-module": Cases(
        environment=facts({"missing_packages": "imagesize, voluptuous"}, {}),
        log=log("ModuleNotFoundError: No module named 'imagesize'", "No module named 'images'"),
    ),
    "uv-in-the-trainers-environment": Cases(
        environment=facts({"package_uv": "0.9.0"}, {"package_uvloop": "1.0"}),
        log=log("Error: command failed: uv python -m pip install -r requirements.txt", "uv pip install torch"),
    ),
    "interpreter-architecture": Cases(
        environment=facts({"architecture": "x86_64", "rosetta": True}, {"architecture": "arm64"}),
        log=log(
            "ImportError: dlopen(_C.so): tried: '_C.so' (mach-o file, but is an incompatible architecture "
            "(have 'x86_64', need 'arm64'))",
            "ImportError: dlopen(_C.so): Symbol not found",
        ),
    ),
    "macos-too-old": Cases(
        environment=facts({"macos": "10.15", "macos_is_older": True}, {"macos": "11.0"}),
        log=log(
            "ERROR: torch-2.5.1-cp311-none-macosx_11_0_arm64.whl is not a supported wheel on this platform.",
            "Downloading torch-2.5.1-cp311-none-macosx_11_0_arm64.whl",
        ),
    ),
    "disk-too-small": Cases(
        environment=facts(
            {"installed": False, "free_gb": 2.5, "needed_gb": 3.0},
            {"installed": True, "free_gb": 2.5, "needed_gb": 3.0},
        ),
        log=log("OSError: [Errno 28] No space left on device", "No space is needed here"),
    ),
    "git-missing": Cases(
        environment=facts({"git": None}, {"git": "git version 2.39.5"}),
        log=log(
            "xcrun: error: invalid active developer path (/Library/Developer/CommandLineTools), missing xcrun",
            "xcrun: note: using the active developer path",
        ),
    ),
    "foreign-python-leaks-in": Cases(
        environment=facts({"conda": "/opt/miniconda3"}, {"conda": None}),
    ),
    "drift": Cases(
        environment=facts({"drift": "numpy 2.4.2 was replaced by 1.26.4"}, {"drift": None}),
        log=log(
            "INFO Validating that requirements are satisfied.\nInstalling collected packages: torch",
            "Installing collected packages: torch",
        ),
    ),
    "interrupted-environment": Cases(
        environment=facts({"installed": False, "interrupted": True}, {"installed": True}),
    ),
    "upstream-gui-updates": Cases(
        log=log("pip install --upgrade -r requirements_pytorch_windows.txt", "pip install -r requirements.txt")
    ),
    "spaces-in-the-path": Cases(
        environment=facts(
            {"home": "/Users/me/My Tools/kohya_ss", "home_has_space": True},
            {"home": "/Users/me/My_Tools/kohya_ss"},
        ),
    ),
    "case-sensitive-disk": Cases(
        environment=facts({"case_sensitive": True}, {"case_sensitive": False}),
    ),
    "synchronised-folder": Cases(
        environment=facts(
            {"home": "/Users/me/Library/Mobile Documents/com~apple~CloudDocs/kohya_ss"},
            {"home": "/Users/me/Documents/Dropboxes/kohya_ss"},
        ),
    ),
    "no-network": Cases(
        environment=facts(
            {"repository_reached": False, "repository": "https://example.org/x", "repository_reason": "404"},
            {"repository_reached": True},
        ),
        log=log("fatal: unable to access: Could not resolve host: github.com", "Resolved 108 packages in 2 ms"),
    ),
    "numpy-abi": Cases(
        environment=facts(
            {"package_numpy": "2.1.0", "package_torch": "2.2.2"},
            {"package_numpy": "2.4.2", "package_torch": "2.5.1", "package_opencv_python": "4.13.0.90"},
        ),
        log=log(
            "A module that was compiled using NumPy 1.x cannot be run in\nNumPy 2.0.1 as it may crash.",
            "A module that was compiled with NumPy 2",
        ),
    ),
    "hub-cached-download": Cases(
        environment=facts(
            {"package_huggingface_hub": "0.26.0", "package_diffusers": "0.25.0"},
            {"package_huggingface_hub": "0.36.2", "package_diffusers": "0.32.2"},
        ),
        log=log(
            "ImportError: cannot import name 'cached_download' from 'huggingface_hub' (/x/__init__.py)",
            "from huggingface_hub import hf_hub_download",
        ),
    ),
    "hub-too-new": Cases(
        environment=facts(
            {"package_huggingface_hub": "1.2.0", "package_transformers": "4.48.1"},
            {"package_huggingface_hub": "1.2.0", "package_transformers": "5.0.0"},
        ),
        log=log(
            "ImportError: cannot import name 'split_torch_state_dict' from 'huggingface_hub'",
            "ImportError: cannot import name 'x' from 'transformers'",
        ),
    ),
    "setuptools-without-pkg-resources": Cases(
        environment=facts(
            {"package_setuptools": "82.0.0", "package_tensorboard": "2.20.0"},
            {"package_setuptools": "84.0.0", "package_tensorboard": "2.21.0"},
        ),
        log=log("ModuleNotFoundError: No module named 'pkg_resources'", "No module named 'resources'"),
    ),
    "tkinter": Cases(
        environment=facts({"tkinter": False}, {"tkinter": True}),
        log=log("ModuleNotFoundError: No module named '_tkinter'", "import tkinter works"),
    ),
    "accelerate-default": Cases(
        environment=facts({"hf_home": "/x", "hf_home_is_file": True}, {"hf_home": "/x"}),
        log=log(
            "shutil.copyfile(src, '/Users/me/hf/accelerate/default_config.yaml')\n"
            "IsADirectoryError: [Errno 21] Is a directory: '/Users/me/hf'",
            "IsADirectoryError: [Errno 21] Is a directory: '/Users/me/pictures'",
        ),
    ),
    "accelerate-configuration-missing": Cases(
        environment=facts({"config_use_cpu": None}, {"config_use_cpu": False}),
        log=log(
            "FileNotFoundError: The passed configuration file `/x/accelerate.yaml` does not exist.",
            "FileNotFoundError: 'configuration file'",
        ),
    ),
    "cpu-without-a-word": Cases(
        settings=Pair(Preflight(command("", "--cpu")), Preflight(command("", "--num_cpu_threads_per_process=2"))),
        environment=facts(
            {"config": "/x/accelerate.yaml", "config_use_cpu": True},
            {"config": "/x/accelerate.yaml", "config_use_cpu": False},
        ),
        log=log("accelerator device: cpu", "accelerator device: mps"),
    ),
    "accelerate-not-on-path": Cases(
        log=log(
            "subprocess.CalledProcessError: Command '['which', 'accelerate']' returned non-zero exit status 1.",
            "$ which accelerate",
        )
    ),
    "fp16": Cases(
        settings=settings({"mixed_precision": "fp16"}, {"save_precision": "fp16"}),
        log=log(
            "ValueError: fp16 mixed precision requires a GPU (not 'mps').", "mixed_precision: fp16 on a GPU"
        ),
    ),
    "bf16": Cases(
        settings=settings({"mixed_precision": "bf16"}, {"save_precision": "bf16"}),
        log=log(
            "ValueError: bf16 mixed precision requires PyTorch >= 1.10 and a supported device.",
            "bf16 mixed precision is on",
        ),
    ),
    "mixed-precision-unknown": Cases(
        settings=settings({"mixed_precision": "fp8"}, {"mixed_precision": "no"}),
        log=log(
            "train_network.py: error: argument --mixed_precision: invalid choice: 'fp8' (choose from 'no')",
            "argument --mixed_precision: no",
        ),
    ),
    "fp8-base": Cases(
        settings=settings({"fp8_base": True}, {"fp8_base": False}),
        log=log(
            "AssertionError: fp8_base requires mixed precision='fp16' or 'bf16'",
            "INFO enable fp8 training for U-Net.",
        ),
    ),
    "fp8-on-the-cpu": Cases(
        settings=settings(
            {"fp8_base": True, "mixed_precision": "no"}, {"fp8_base": False, "mixed_precision": "no"}
        ),
        log=log(
            '  File "torch/nn/functional.py", line 3048, in group_norm\n'
            "RuntimeError: mixed dtype (CPU): expect parameter to have scalar type of Float",
            "RuntimeError: mixed dtype (CPU): expect parameter to have scalar type of Float",
        ),
    ),
    "full-half-precision": Cases(
        settings=settings({"full_fp16": True}, {"full_fp16": False, "save_precision": "fp16"}),
        log=log("AssertionError: full_fp16 requires mixed precision='fp16'", "enable full fp16 training."),
    ),
    "operator-not-implemented": Cases(
        environment=facts({"mps_fallback": "true"}, {"mps_fallback": "1"}),
        log=log(
            "NotImplementedError: The operator 'aten::linalg_qr.out' is not currently implemented for the MPS\n"
            "device. If you want this op to be added",
            "The operator 'aten::mul' is implemented for the MPS device",
        ),
    ),
    "watermark-ratio": Cases(
        environment=facts(
            {"high_watermark": 0.7, "low_watermark": 1.4}, {"high_watermark": 1.5, "low_watermark": 1.4}
        ),
        log=log("RuntimeError: invalid low watermark ratio 1.4", "a low watermark ratio of 1.4"),
    ),
    "memory": Cases(
        settings=Pair(
            Preflight(
                lambda w: w.toml(pretrained_model_name_or_path="owner/sdxl", gradient_checkpointing=False),
                trainer=SDXL,
                memory_gb=8.0,
            ),
            Preflight(
                lambda w: w.toml(pretrained_model_name_or_path="owner/sdxl", no_half_vae=True),
                trainer=SDXL,
                memory_gb=64.0,
            ),
        ),
        environment=facts({"memory_gb": 7.9}, {"memory_gb": 8.2}),
        log=log(
            "RuntimeError: MPS backend out of memory (MPS allocated: 17.2 GB, max allowed: 18.1 GB).",
            "peak MPS memory 17.2 GB",
        ),
    ),
    "virtual-mac": Cases(
        environment=facts({"virtual_machine": True}, {"virtual_machine": False}),
        log=log("RuntimeError: MPS backend out of memory (MPS allocated: 0 bytes, other", "allocated: 0 bytes"),
    ),
    "xformers": Cases(
        settings=settings({"xformers": True}, {"xformers": False}),
        log=log("ModuleNotFoundError: No module named 'xformers'", "Enable SDPA, xformers is not used"),
    ),
    "xformers-not-installed": Cases(
        settings=settings({"xformers": True}, {"xformers": False}),
        log=log("ModuleNotFoundError: No module named 'xformers'", "Enable SDPA, xformers is not used"),
    ),
    "attention": Cases(settings=settings({"sdpa": None}, {"sdpa": None, "mem_eff_attn": True})),
    "8-bit-optimizer": Cases(
        settings=settings({"optimizer_type": "PagedAdamW8bit"}, {"optimizer_type": "AdamW"}),
        log=log("ImportError: No bitsandbytes / bitsandbytes is missing", "use AdamW, not bitsandbytes"),
    ),
    "bitsandbytes-not-installed": Cases(
        settings=settings({"optimizer_type": "AdamW8bit"}, {"optimizer_type": "Lion"}),
        log=log("ImportError: No bitsandbytes / bitsandbytes is missing", "use AdamW, not bitsandbytes"),
    ),
    "optimizer-package": Cases(
        settings=settings(
            {"optimizer_type": "DAdaptAdam", "learning_rate": 1.0},
            {"optimizer_type": "Prodigy", "learning_rate": 1.0},
        ),
        log=log("ImportError: No dadaptation / dadaptation is missing", "use D-Adaptation Adam optimizer"),
    ),
    "learning-rate-of-prodigy": Cases(
        settings=settings(
            {"optimizer_type": "Prodigy", "learning_rate": 1e-4},
            {"optimizer_type": "prodigy", "learning_rate": 1.0},
        ),
        log=log(
            "WARNING learning rate is too low. If using D-Adaptation or\n   Prodigy, set learning rate around 1.0",
            "learning rate 1.0",
        ),
    ),
    "validation-on-mps": Cases(
        settings=settings({"validation_split": 0.1}, {"validation_split": 0.0, "validation_seed": 1}),
        log=log(
            '  File "train_network.py", line 1351\n    gpu_rng_state = torch.cuda.get_rng_state()\n'
            "AssertionError: Torch not compiled with CUDA enabled",
            '  File "other.py", line 3\n    x.cuda()\nAssertionError: Torch not compiled with CUDA enabled',
        ),
    ),
    "sampling-with-old-scripts": Cases(
        log=log(
            '  File "train_util.py", line 3000, in sample_images\n    torch.cuda.empty_cache()\n'
            "AssertionError: Torch not compiled with CUDA enabled",
            '  File "x.py", line 3, in validate\nAssertionError: Torch not compiled with CUDA enabled',
        )
    ),
    "cuda-asked-for": Cases(
        log=log("AssertionError: Torch not compiled with CUDA enabled", "torch was compiled with CUDA")
    ),
    "huber-with-snr": Cases(
        settings=settings({"loss_type": "huber"}, {"loss_type": "huber", "huber_schedule": "exponential"}),
        log=log(
            '  File "train_util.py", line 6025, in get_huber_threshold_if_needed\n'
            "RuntimeError: Expected all tensors to be on the same device, but found at least two devices",
            "RuntimeError: Expected all tensors to be on the same device, but found at least two devices",
        ),
    ),
    "flux": Cases(
        settings=Pair(
            Preflight(_model("flux")), toml(pretrained_model_name_or_path="owner/not-a-fluxion-model")
        ),
        log=log(
            "TypeError: Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.",
            "Converting a tensor to float64",
        ),
    ),
    "blocks-to-swap": Cases(
        settings=settings({"blocks_to_swap": 18}, {"blocks_to_swap": 0}),
        log=log(
            "TypeError: synchronize_device() missing 1 required positional argument: 'device'",
            "synchronize_device() returned",
        ),
    ),
    "deepspeed": Cases(
        settings=settings({"deepspeed": True}, {"deepspeed": False}),
        log=log("ImportError: deepspeed is not installed. please install deepspeed", "deepspeed: False"),
    ),
    "workers-and-pickling": Cases(
        settings=settings(
            {"max_data_loader_n_workers": None},
            {"max_data_loader_n_workers": 2, "persistent_data_loader_workers": True},
        ),
        log=log("AttributeError: Can't pickle local object 'main.<locals>.collate'", "pickle a local object"),
    ),
    "persistent-without-workers": Cases(
        settings=settings(
            {"persistent_data_loader_workers": True},
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 1},
        ),
        log=log("ValueError: persistent_workers option needs num_workers > 0", "persistent_workers=True"),
    ),
    "half-precision-vae": Cases(
        settings=Pair(
            Preflight(lambda w: w.toml(pretrained_model_name_or_path="owner/sdxl"), trainer=SDXL),
            Preflight(lambda w: w.toml(pretrained_model_name_or_path="owner/sdxl", no_half_vae=True), trainer=SDXL),
        ),
        log=log("steps: 10%| 1/10 [00:01<00:09, 1.0it/s, avr_loss=nan]", "steps: 10%| 1/10, avr_loss=0.08"),
    ),
    "lycoris-full-and-ia3": Cases(
        settings=settings(
            {"network_module": "lycoris.kohya", "network_args": ["algo=ia3"]},
            {"network_module": "lycoris.kohya", "network_args": ["algo=loha"]},
        ),
        log=log(
            '  File "site-packages/lycoris/modules/full.py", line 60, in x\n'
            "AttributeError: 'Linear' object has no attribute 'weight'",
            "AttributeError: 'Linear' object has no attribute 'weight'",
        ),
    ),
    "boft-rank": Cases(
        settings=settings(
            {"network_module": "lycoris.kohya", "network_args": ["algo=boft"], "network_dim": 8},
            {"network_module": "lycoris.kohya", "network_args": ["algo=boft"], "network_dim": 10},
        ),
        log=log(
            "ValueError: It is impossible to decompose 320 with factor 4 under BOFT constraints.",
            "INFO Use BOFT(5, 5) (equivalent to factor=10) for dim=320 and factor=16",
        ),
    ),
    "ckpt-runs-code": Cases(settings=files(_pickle("model.ckpt"), _pickle("model.ckpt.safetensors"))),
    "tokenizer-offline": Cases(
        settings=Pair(
            Preflight(lambda w: w.toml(), environ=OFFLINE), Preflight(_tokenizer, environ=OFFLINE)
        ),
        log=log(
            "OSError: Can't load tokenizer for 'openai/clip-vit-large-patch14'. If you were trying to load",
            "loading tokenizer openai/clip-vit-large-patch14",
        ),
    ),
    "wrong-type": Cases(
        settings=settings({"resolution": 512}, {"resolution": "512"}),
        log=log("AttributeError: 'int' object has no attribute 'split'", "'int' object"),
    ),
    "wrong-trainer": Cases(
        settings=Pair(
            Preflight(_model("sdxl"), trainer="train_network.py"),
            Preflight(_model("sd15"), trainer="train_network.py"),
        ),
        log=log(
            "RuntimeError: Error(s) in loading state_dict for UNet2DConditionModel:\n\tMissing key(s)",
            "loading state_dict for UNet2DConditionModel",
        ),
    ),
    "base-model-missing": Cases(
        settings=settings(
            {"pretrained_model_name_or_path": "/nowhere/model.safetensors"},
            {"pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5"},
        ),
        log=log(
            "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name'", "Repo id: x/y"
        ),
    ),
    "base-model-damaged": Cases(
        settings=files(_model("sd15", cut=4), _model("sd15")),
        log=log(
            "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
            "deserializing the header took 3 ms",
        ),
    ),
    "sdxl-folder-without-fp16": Cases(
        settings=files(
            _sdxl_folder("model.safetensors"), _sdxl_folder("model.safetensors", "model.fp16.safetensors")
        ),
        log=log(
            "ValueError: You are trying to load the model files of the `variant=fp16`, but no such modeling\n"
            "files are available.",
            "INFO load Diffusers pretrained models: model, variant=fp16",
        ),
    ),
    "no-pictures": Cases(
        settings=files(_renamed_folder, _two_folders("5_dog")),
        log=log(
            "ERROR    No data found. Please verify arguments (train_data_dir must be the parent",
            "Please verify your arguments",
        ),
    ),
    "pictures-passed-over": Cases(settings=files(_two_folders("dogs"), _two_folders("1_dogs"))),
    "unreadable-pictures": Cases(
        settings=files(_cut_picture, _grey_picture),
        log=log("OSError: image file is truncated (12 bytes not processed)", "the log was truncated"),
    ),
    "caption-extension": Cases(
        settings=settings({"caption_extension": None}, {"caption_extension": ".txt"}),
        log=log("WARNING No caption file found for 8 images. Training will continue", "found 8 caption files"),
    ),
    "caption-file": Cases(
        settings=files(_caption(b""), _caption("ein Kätzchen".encode())),
        log=log("AssertionError: caption file is empty / a.txt", "the caption file is a.txt"),
    ),
    "resolution": Cases(
        settings=settings(
            {"resolution": "32,32", "enable_bucket": True},
            {"resolution": "256,256", "enable_bucket": True},
        ),
        log=log(
            "AssertionError: min_bucket_reso must be equal or less than resolution", "min_bucket_reso is adjusted"
        ),
    ),
    "cached-latents-and-augmentation": Cases(
        settings=settings({"random_crop": True}, {"random_crop": True, "cache_latents": False}),
        log=log(
            "AssertionError: when caching latents, either color_aug or random_crop cannot be used",
            "caching latents.",
        ),
    ),
    "output-directory": Cases(
        settings=files(_output_is_file, lambda w: w.toml(output_dir=str(w.root / "new" / "deep"))),
        log=log("OSError: [Errno 30] Read-only file system: '/Volumes/x'", "file system is fine"),
    ),
    "nothing-to-train": Cases(
        settings=settings({"max_train_steps": 0}, {"max_train_steps": 1}),
        log=log(
            "num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)\nZeroDivisionError: x",
            "ZeroDivisionError: division by zero",
        ),
    ),
    "network-module": Cases(
        settings=settings({"network_module": None}, {"network_module": "networks.dylora"}),
        log=log("ModuleNotFoundError: No module named 'networks.lora_xl'", "import network module: networks.lora"),
    ),
    "signal-of-the-system": Cases(
        log=log("zsh: killed     python train_network.py", "the skilled zsh: user")
    ),
}  # fmt: skip
