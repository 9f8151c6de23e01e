"""The settings that kohya_ss's GUI saves as JSON: what it would pass to the trainer, and edits.

JSON has no comments. The line before a changed one explains it, under a key that begins
with ``//``, which the GUI ignores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kohya_mps.core.errors import UsageError

from . import command
from .contents import ACCEPTED, Contents, Settings
from .edits import Change, Corrected, Edit, Value, one_line, replace_spans
from .shell_words import commands
from .trainer_options import NAMES

# GUI names that differ from the trainers' (kohya_ss, kohya_gui/lora_gui.py, config_toml_data).
TRAINER_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "LoRA_type": "network_module",
    "sdxl_no_half_vae": "no_half_vae",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "flux1_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sd3_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "image_folder": "train_data_dir",
}
GUI_NAMES = frozenset(TRAINER_NAMES) | {"model_list", "flux1_checkbox", "sd3_checkbox", "sdxl"}

# What a field of the GUI shows if the file does not name it (the classes of kohya_gui/).
_DEFAULTS: Settings = {
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


def parse(path: Path, text: str) -> dict[str, Any]:
    """Parse JSON.

    Raises:
        UsageError: it is not valid, or not an object.
    """
    try:
        data = msgspec.json.decode(text)
    except RecursionError:
        raise UsageError(f"{path} is nested too deeply for settings", ACCEPTED) from None
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}", ACCEPTED) from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} contains a JSON {type(data).__name__}, not the GUI's settings", ACCEPTED)
    return data


def read(path: Path, data: Settings) -> Contents:
    """The GUI's settings, as the GUI passes them to a trainer.

    Raises:
        UsageError: these are no settings of the GUI.
    """
    if len((NAMES | GUI_NAMES) & data.keys()) < 2:
        raise UsageError(f"{path} contains no settings of kohya_ss's GUI", ACCEPTED)
    shown = {**_DEFAULTS, **{name: value for name, value in data.items() if value is not None}}
    passed = _renamed(shown)
    passed |= _attention(shown.get("xformers"))
    passed |= _network(shown)
    passed["optimizer_type"] = shown.get("optimizer") or (
        "AdamW8bit" if shown.get("use_8bit_adam") else "AdamW"
    )
    if not _number(shown["max_train_steps"]) and not (
        shown.get("dataset_config") or _number(shown.get("max_train_epochs"))
    ):
        passed["max_train_epochs"] = shown.get("epoch") or 1  # the GUI computes the steps from it
    passed.pop("use_8bit_adam", None)
    # The GUI leaves out what is empty, false or zero: then the trainer's default holds.
    settings = {n: v for n, v in passed.items() if isinstance(v, list) or v not in ("", False, None, "0")}
    settings["max_data_loader_n_workers"] = shown["max_data_loader_n_workers"] or 0
    settings |= {option.name: option.value for option in _additional(shown)}
    absent = [n for n in ("mixed_precision", "xformers") if data.get(n) is None]
    notes = [f"not in the file, so the GUI's own default holds: {n} = {_DEFAULTS[n]}" for n in absent]
    return Contents(settings, _trainer(shown), tuple(notes))


def _additional(shown: Settings) -> tuple[command.Option, ...]:
    """The options of the field "Additional parameters", which come after all others."""
    text = shown.get("additional_parameters")
    if not isinstance(text, str):
        return ()
    return command.options([w for words in commands(text.replace('"', ""), windows=False) for w in words])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _renamed(shown: Settings) -> dict[str, Any]:
    passed = {name: value for name, value in shown.items() if name in NAMES}
    for gui_name, name in TRAINER_NAMES.items():
        # Three of them have the same meaning; one that is not ticked must not hide one that is.
        if shown.get(gui_name) and (gui_name != "sdxl_no_half_vae" or _is_sdxl(shown)):
            passed[name] = shown[gui_name]
    return passed


def _attention(choice: Any) -> dict[str, Any]:
    old = {True: "xformers", False: "none"}  # what earlier versions of the GUI saved
    chosen = old[choice] if isinstance(choice, bool) else choice
    return {"xformers": chosen == "xformers", "sdpa": chosen == "sdpa"}


def _network(shown: Settings) -> dict[str, Any]:
    kind = shown.get("LoRA_type")
    if not isinstance(kind, str) or not kind:
        return {"network_module": None}
    arguments = [f"{n}={shown[n]}" for n in ("conv_dim", "conv_alpha", "factor") if shown.get(n)]
    if kind in _LYCORIS:
        return {"network_module": "lycoris.kohya", "network_args": [f"algo={_LYCORIS[kind]}", *arguments]}
    module = _MODULES.get(kind, "networks.lora_sd3" if shown.get("sd3_checkbox") else "networks.lora")
    return {"network_module": module, "network_args": arguments if kind == "Kohya LoCon" else []}


def _is_sdxl(shown: Settings) -> bool:
    return bool(shown.get("sdxl") or shown.get("sdxl_checkbox"))


def _trainer(shown: Settings) -> str:
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


# ---- Edits --------------------------------------------------------------------------------------


class _Member(msgspec.Struct, frozen=True):
    """A member of the JSON object: its name, and where its key and its value are in the text."""

    name: str
    key_start: int
    start: int
    end: int


def edit(text: str, edits: list[Edit]) -> Corrected:
    """The text with settings changed, each under the GUI's name."""
    members = {member.name: member for member in _members(text)}
    additional = {option.name for option in _additional(msgspec.json.decode(text))}
    changes: list[Change] = []
    spans: list[tuple[int, int, str]] = []
    for change in _with_gui_names([e for e in edits if e.name not in additional], members):
        member = members.get(change.name)
        new = json.dumps(change.value, ensure_ascii=False)
        if member is None and change.value not in ("", False, 0):
            first = text.index("{") + 1
            note = _note(change, "added")
            spans.append((first, first, f"\n  {note},\n  {json.dumps(change.name)}: {new},"))
            changes.append(Change(change.name, "", new, change.why))
        elif member is not None and (was := text[member.start : member.end]) != new:
            line = text.rfind("\n", 0, member.key_start) + 1
            indent = text[line : member.key_start]
            between = f",\n{indent}" if not indent.strip() else ", "
            note = _note(change, f"was {was}")
            spans += [
                (member.key_start, member.key_start, note + between),
                (member.start, member.end, new),
            ]
            changes.append(Change(change.name, was, new, change.why))
    not_fixable = tuple(e.name for e in edits if e.name in additional)
    return Corrected(replace_spans(text, spans), tuple(changes), not_fixable)


def _with_gui_names(edits: list[Edit], members: Mapping[str, _Member]) -> Iterator[Edit]:
    """The edits with the GUI's names and values. The GUI does not pass on what is empty."""
    for change in edits:
        name, value, why = change.name, change.value, change.why
        if name in ("xformers", "sdpa"):
            if value:
                yield Edit("xformers", name, why)  # one field with the name of the attention
        elif name == "network_module":
            yield Edit("LoRA_type", "Standard", why)
        elif name not in ("use_8bit_adam", "launch_cpu"):
            if value is None:
                value = _empty(name)
            for gui_name in _gui_names(name, members):
                yield Edit(gui_name, value, why)


def _gui_names(name: str, members: Mapping[str, _Member]) -> list[str]:
    """The GUI's names for a trainer's name: those in the file, or the one to add."""
    names = [*(gui_name for gui_name, trainers in TRAINER_NAMES.items() if trainers == name), name]
    return [n for n in names if n in members] or names[:1]


def _empty(name: str) -> Value:
    return 0 if name in ("blocks_to_swap", "validation_split") else False


def _note(change: Edit, what: str) -> str:
    text = one_line(f"preflight: {what}; {change.why}")
    return f"{json.dumps('// ' + change.name)}: {json.dumps(text, ensure_ascii=False)}"


def _members(text: str) -> Iterator[_Member]:
    """The members of the outermost object of a valid JSON text."""
    decoder = json.JSONDecoder()
    blank = re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    at = skip(text.index("{") + 1)
    while text[at] == '"':
        name, after = decoder.raw_decode(text, at)
        start = skip(after)
        _, end = decoder.raw_decode(text, start)
        yield _Member(name, at, start, end)
        at = skip(end)
