"""Reading what people really have: a trainer's TOML, the GUI's JSON, a pasted command line."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path, PureWindowsPath
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError

from .shell_words import Word, commands
from .trainer_options import NAMES

LARGEST_BYTES = 4_000_000

Values = Mapping[str, Any]


class Kind(StrEnum):
    """What wrote the file, and so how its settings are named and typed."""

    TOML = "the TOML of a trainer"
    DATASET = "a dataset configuration"
    GUI = "settings saved by the GUI"
    GUI_DEFAULTS = "the defaults of the GUI (config.toml)"
    COMMAND = "a command line"


class ConfigFile(msgspec.Struct, frozen=True):
    """A training as a file describes it.

    ``settings`` have the trainers' names, whatever the file calls them. ``trainer`` is the
    script that it is for, empty when the file does not say. ``notes`` are things about the
    file that a person should know.
    """

    path: Path
    kind: Kind
    text: str
    settings: Values
    trainer: str = ""
    notes: tuple[str, ...] = ()

    @property
    def numbers_as_text(self) -> bool:
        """Whether what reads the file turns text into numbers."""
        return self.kind is not Kind.TOML


def read(path: Path) -> ConfigFile:
    """Read a file that says how to train.

    Raises:
        UsageError: it cannot be read, or it is none of the three.
    """
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{path} is empty", _ACCEPTED)
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _gui(path, text, _json(path, text))
    is_script = path.suffix.lower() in _SCRIPTS or (
        path.suffix.lower() != ".toml" and _looks_like_command(text)
    )
    if is_script:
        return _command(path, text)
    try:
        return _toml(path, text, parse_toml(path, text))
    except UsageError as error:
        if path.suffix.lower() == ".toml":
            raise
        raise UsageError(f"{path} is none of the three (as TOML: {error.what})", _ACCEPTED) from error


def read_text(path: Path) -> str:
    """A settings file's text, its line ends as they are.

    Raises:
        UsageError: it is no file, too large, or no text.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path}: there is no such file", _ACCEPTED)
        with path.open("rb") as file:
            data = file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if len(data) > LARGEST_BYTES:
        raise UsageError(f"{path} is larger than {LARGEST_BYTES // 1_000_000} MB: no settings are", _ACCEPTED)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8: {error}", "save it as UTF-8") from error
    if "\0" in text:
        raise UsageError(f"{path} is not text: it holds zero bytes", _ACCEPTED)
    return text


# Settings that name a file or a folder.
_PATHS = (
    "pretrained_model_name_or_path", "tokenizer_cache_dir", "vae", "train_data_dir", "reg_data_dir",
    "dataset_config", "in_json", "network_weights", "sample_prompts",
)  # fmt: skip


def base_directory(file: ConfigFile) -> Path:
    """Where the settings' paths begin: beside the file, or where the user stands if only there is what they name."""
    beside, here = Path(os.path.abspath(file.path)).parent, Path.cwd()
    told = (file.settings.get(name) for name in _PATHS)
    missing = [
        path
        for value in told
        if isinstance(value, str) and not (beside / (path := Path(value).expanduser())).exists()
    ]
    return here if any((here / path).exists() for path in missing) else beside


_ACCEPTED = (
    "give the TOML that `train_network.py --config_file` takes, a JSON saved by kohya_ss's GUI, "
    "or a training command pasted into a file"
)


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        UsageError: it is not TOML; the line is named.
    """
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply to be settings", _ACCEPTED) from None
    except ValueError as error:  # int() refuses numbers of 4300 digits, too
        hint = "in TOML a backslash in double quotes needs another one, or use 'single quotes'"
        raise UsageError(f"{path} is not valid TOML: {error}", hint if "\\" in text else _ACCEPTED) from error


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        data = msgspec.json.decode(text)
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply to be settings", _ACCEPTED) from None
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}", _ACCEPTED) from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds a JSON {type(data).__name__}, not the GUI's settings", _ACCEPTED)
    return data


def _toml(path: Path, text: str, data: dict[str, Any]) -> ConfigFile:
    if isinstance(data.get("datasets"), list):
        return ConfigFile(path, Kind.DATASET, text, {"dataset_config": str(path)})
    flat = flatten(data)
    if "accelerate_launch" in data or ("basic" in data and "model" in data):
        return msgspec.structs.replace(_gui(path, text, flat), kind=Kind.GUI_DEFAULTS)
    if not NAMES & flat.keys() and not _GUI_NAMES & flat.keys():
        raise UsageError(f"{path} holds no setting that the trainers know", _ACCEPTED)
    return ConfigFile(path, Kind.TOML, text, flat, notes=_gui_names_in_trainer_toml(flat))


def flatten(data: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's settings, its sections taken away as ``read_config_from_file`` does.

    sd-scripts 2e0fcc50, ``library/train_util.py``, line 4655: one level of tables is
    merged, in the order of the file, and the last of two equal names wins.
    """
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _gui_names_in_trainer_toml(flat: Values) -> tuple[str, ...]:
    found = [
        f"{name} (the trainer's name: {_GUI_TO_TRAINER[name]})" for name in _GUI_TO_TRAINER if name in flat
    ]
    if not found:
        return ()
    return (f"the trainers ignore these names of the GUI without a word: {', '.join(found)}",)


# What the GUI calls otherwise than the trainers (kohya_ss, kohya_gui/lora_gui.py, config_toml_data).
_GUI_TO_TRAINER = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "LoRA_type": "network_module",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sd3_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "image_folder": "train_data_dir",
}
_GUI_NAMES = frozenset(_GUI_TO_TRAINER) | {"model_list", "flux1_checkbox", "sd3_checkbox", "sdxl"}

# What a field of the GUI shows when a file does not name it (the classes of kohya_gui/).
_GUI_DEFAULTS: Values = {
    "mixed_precision": "fp16",
    "save_precision": "fp16",
    "xformers": "xformers",
    "max_resolution": "512,512",
    "caption_extension": ".txt",
    "max_train_steps": 1600,
    "max_data_loader_n_workers": 0,
    "max_bucket_reso": 2048,
    "enable_bucket": True,
    "cache_latents": True,
    "save_every_n_epochs": 1,
}

_LYCORIS = {
    "LoCon": "locon",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/Native Fine-Tuning": "full",
    "LyCORIS/iA3": "ia3",
}
_MODULES = {
    "LoRA-FA": "networks.lora_fa",
    "Kohya DyLoRA": "networks.dylora",
    "Flux1": "networks.lora_flux",
    "Flux1 OFT": "networks.oft_flux",
}


def _gui(path: Path, text: str, data: dict[str, Any]) -> ConfigFile:
    """The GUI's settings, as the GUI would tell them to a trainer."""
    if len((NAMES | _GUI_NAMES) & data.keys()) < 2:
        raise UsageError(f"{path} holds no settings of kohya_ss's GUI", _ACCEPTED)
    shown = {**_GUI_DEFAULTS, **{name: value for name, value in data.items() if value is not None}}
    absent = [n for n in ("mixed_precision", "xformers") if data.get(n) is None]
    told = _renamed(shown)
    told |= _attention(shown.get("xformers"))
    told |= _network(shown)
    told["optimizer_type"] = shown.get("optimizer") or (
        "AdamW8bit" if shown.get("use_8bit_adam") else "AdamW"
    )
    if not _number(shown["max_train_steps"]) and not (
        shown.get("dataset_config") or _number(shown.get("max_train_epochs"))
    ):
        told["max_train_epochs"] = shown.get("epoch") or 1  # what the GUI works the steps out from
    told.pop("use_8bit_adam", None)
    # The GUI leaves out what is empty, false or zero: the trainer's own default holds then.
    settings = {n: v for n, v in told.items() if isinstance(v, list) or v not in ("", False, None, "0")}
    settings["max_data_loader_n_workers"] = shown["max_data_loader_n_workers"] or 0
    more = shown.get("additional_parameters")
    if isinstance(more, str) and more.strip():
        settings |= _options([w for c in commands(more.replace('"', ""), windows=False) for w in c])
    notes = [f"not in the file, so the GUI's own default holds: {n} = {_GUI_DEFAULTS[n]}" for n in absent]
    return ConfigFile(path, Kind.GUI, text, settings, _gui_trainer(shown), tuple(notes))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _renamed(shown: Values) -> dict[str, Any]:
    told = {name: value for name, value in shown.items() if name in NAMES}
    for theirs, ours in _GUI_TO_TRAINER.items():
        # Three of them mean the same; one that is not ticked must not hide one that is.
        if shown.get(theirs) and (theirs != "sdxl_no_half_vae" or _is_sdxl(shown)):
            told[ours] = shown[theirs]
    return told


def _attention(choice: Any) -> dict[str, Any]:
    old = {True: "xformers", False: "none"}
    chosen = old[choice] if isinstance(choice, bool) else choice
    return {"xformers": chosen == "xformers", "sdpa": chosen == "sdpa"}


def _network(shown: Values) -> dict[str, Any]:
    kind = shown.get("LoRA_type")
    if not isinstance(kind, str) or not kind:
        return {"network_module": None}
    arguments = [f"{n}={shown[n]}" for n in ("conv_dim", "conv_alpha", "factor") if shown.get(n)]
    if kind in _LYCORIS:
        return {"network_module": "lycoris.kohya", "network_args": [f"algo={_LYCORIS[kind]}", *arguments]}
    module = _MODULES.get(kind, "networks.lora_sd3" if shown.get("sd3_checkbox") else "networks.lora")
    return {"network_module": module, "network_args": arguments if kind == "Kohya LoCon" else []}


def _is_sdxl(shown: Values) -> bool:
    return bool(shown.get("sdxl") or shown.get("sdxl_checkbox"))


def _gui_trainer(shown: Values) -> str:
    families = (
        ("sdxl_", _is_sdxl(shown)),
        ("flux_", shown.get("flux1_checkbox")),
        ("sd3_", shown.get("sd3_checkbox")),
    )
    family = next((name for name, chosen in families if chosen), "")
    if shown.get("LoRA_type"):
        return f"{family}train_network.py"
    if "num_vectors_per_token" in shown:
        return f"{family}train_textual_inversion.py"
    if family:
        return f"{family}train.py"
    fine_tuning = {"image_folder", "create_caption", "create_buckets"} & shown.keys()
    return "fine_tune.py" if fine_tuning else "train_db.py"


_TRAINER = re.compile(r"(?:\w*train\w*|fine_tune)\.py")


_WINDOWS_SCRIPTS = frozenset({".ps1", ".bat", ".cmd"})
_SCRIPTS = _WINDOWS_SCRIPTS | {".sh", ".command"}


def _looks_like_command(text: str) -> bool:
    return bool(re.search(r"(^|\s)--[a-z][\w]*", text)) and not re.match(
        r"\s*(\[|[\w.\"-]+[ \t]*=[ \t])", text
    )


def _command(path: Path, text: str) -> ConfigFile:
    windows = is_windows(path, text)
    trainings = [(at, words) for words in commands(text, windows) if (at := trainer_at(words)) is not None]
    if not trainings:
        raise UsageError(f"{path} holds no training command", _ACCEPTED)
    at, words = trainings[0]
    notes = [f"{len(trainings)} training commands: the first was checked"] if len(trainings) > 1 else []
    trainer = PureWindowsPath(words[at].value).name if at >= 0 else ""
    settings = _options(words[at + 1 :])
    if isinstance(config := settings.pop("config_file", None), str):
        settings = _config_file(path, config) | settings
    launch = _options(words[: max(at, 0)])
    settings["launch_cpu"] = bool(launch.get("cpu") or launch.get("use_cpu"))
    unknown = sorted(n for n, v in settings.items() if n in NAMES and isinstance(v, str) and "$" in v)
    if unknown:
        notes.append(f"left out, their variables are set elsewhere: {', '.join(unknown)}")
    told = {name: value for name, value in settings.items() if name not in unknown}
    return ConfigFile(path, Kind.COMMAND, text, told, trainer, tuple(notes))


def is_windows(path: Path, text: str) -> bool:
    """Whether a script is PowerShell's or cmd's: a backslash in it belongs to a path."""
    return path.suffix.lower() in _WINDOWS_SCRIPTS or bool(
        re.search(r"[`^][ \t]*\r?\n|(^|[\s\"'=])[A-Za-z]:\\", text)
    )


def trainer_at(words: list[Word]) -> int | None:
    """Where the trainer's script stands in a command; -1 when only its options were pasted."""
    scripts = [i for i, word in enumerate(words) if _TRAINER.fullmatch(PureWindowsPath(word.value).name)]
    if scripts:
        return scripts[-1]  # a launcher of the trainer may stand before it
    names = {word.value.removeprefix("--").partition("=")[0] for word in words if word.value.startswith("--")}
    only_options = bool(words) and words[0].value.startswith("--")
    return -1 if only_options and len(names & NAMES) >= 2 else None


def _config_file(path: Path, config: str) -> dict[str, Any]:
    """The TOML that a command names; the trainer adds the ending when it is missing."""
    named = Path(config if config.endswith(".toml") else f"{config}.toml").expanduser()
    found = next((p for p in (named, path.parent / named) if p.is_file()), named)
    return flatten(parse_toml(found, read_text(found)))


_LISTS = frozenset({"network_args", "optimizer_args", "lr_scheduler_args", "text_encoder_lr", "base_weights"})


def _options(words: list[Word]) -> dict[str, Any]:
    """``--name value``, ``--name=value`` and ``--name`` as argparse takes them."""
    given: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.value.startswith("--"):
            name, equals, value = word.value[2:].partition("=")
            given[name] = ([value] if name in _LISTS else value) if equals else [] if name in _LISTS else True
        elif name and isinstance(given[name], list):
            given[name].append(word.value)
        elif name and given[name] is True:
            given[name] = word.value
    return given
