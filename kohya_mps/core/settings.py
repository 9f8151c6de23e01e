"""Settings: the values of ``config/`` and what overrides them, validated when they are read."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml
from packaging.version import Version

from .errors import UsageError, restores
from .installation import Installation, installed_profile
from .machine import macos_version, on_mac
from .text import shorten

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
CONSTRAINTS = ROOT / "constraints"
GUI_PRESETS = CONFIG / "gui-presets"
PROBES = ROOT / "kohya_mps" / "probes"

# libyaml's loader is ten times as fast. PyYAML's wheels have it; a build from source may not.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")

_RELEASE = re.compile(r"\d+(\.\d+){0,2}")

T = TypeVar("T")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class CheckoutSettings(_Strict, frozen=True):
    """Where the checkout comes from, which commit it is, and where it goes."""

    url: str
    commit: str
    home: str


class _File(_Strict, frozen=True):
    checkout: CheckoutSettings
    profile: str
    generations_kept: int
    mixed_precision: str
    network_stall_seconds: float


class Forbidden(_Strict, frozen=True):
    """Packages that must not be in an environment: on any system, and on macOS."""

    any: tuple[str, ...]
    darwin: tuple[str, ...]


class Profile(_Strict, frozen=True):
    """A named set of pins and the rules that hold for it (``config/profiles/NAME.yaml``)."""

    lock: str
    gui_lock: str
    summary: str
    python: str
    macos: str
    mixed_precision: dict[str, tuple[str, ...]]
    disk_gb: dict[str, float]
    forbidden: Forbidden
    needs_macos: dict[str, str] = {}

    @property
    def lock_file(self) -> Path:
        """The generated, hashed constraints file."""
        return self.lock_for(gui=False)

    def lock_for(self, *, gui: bool) -> Path:
        """The constraints file of the trainer alone, or of the trainer with kohya's web page."""
        return CONSTRAINTS / f"{self.gui_lock if gui else self.lock}.txt"

    def forbidden_here(self) -> tuple[str, ...]:
        """The forbidden packages on this operating system."""
        return self.forbidden.any + (self.forbidden.darwin if on_mac() else ())

    def precisions(self, device: str) -> tuple[str, ...]:
        """The mixed precisions that this profile's accelerate and torch accept on a device of this machine.

        On MPS they also depend on the version of macOS: ``needs_macos`` has the lowest for each.
        """
        allowed = self.mixed_precision.get(device, ("no",))
        if device != "mps":
            return allowed
        here = Version(macos_version())
        return tuple(name for name in allowed if here >= Version(self.needs_macos.get(name, "0")))


class Gui(_Strict, frozen=True):
    """kohya's web page (``config/gui.yaml``): its address, and the values that its forms open with.

    ``forms`` are sections, keys and values of kohya_ss's own ``config.toml``. ``modules`` is
    what the page imports in addition to the trainer's modules.
    """

    port: int
    answers_within_seconds: float
    modules: tuple[str, ...]
    forms: dict[str, dict[str, bool | int | float | str]]


class Settings(msgspec.Struct, frozen=True):
    """The settings of one command, with every override applied."""

    home: Path
    url: str
    commit: str
    profile_name: str
    profile: Profile
    mixed_precision: str
    generations_kept: int
    network_stall_seconds: float


def load(
    *,
    url: str | None = None,
    commit: str | None = None,
    profile: str | None = None,
    mixed_precision: str | None = None,
    config: Path = CONFIG,
) -> Settings:
    """Read ``config/`` and apply what overrides it.

    A flag (the arguments of this function) goes before a ``KOHYA_*`` variable, that before
    the installed profile, and that before ``config/``.

    Raises:
        UsageError: a key is unknown, or a type or value is invalid. It names the file, flag
            or variable, the key, what was found and what is accepted.
    """
    path = config / "settings.yaml"
    file = read_yaml(path, _File)
    _check_numbers(file, path)
    home = _home(file.checkout.home, f"{path}: checkout.home")
    installed = installed_profile(Installation(home))
    if installed not in profile_names(config):  # none, or of a version that had other profiles
        installed = ""
    name, origin = _override(installed or file.profile, "KOHYA_PROFILE", profile, f"{path}: profile")
    return Settings(
        home=home,
        url=_url(_override(file.checkout.url, "KOHYA_REPO_URL", url, f"{path}: checkout.url")[0]),
        commit=_commit(*_override(file.checkout.commit, "KOHYA_COMMIT", commit, f"{path}: checkout.commit")),
        profile_name=name,
        profile=load_profile(name, origin, config),
        mixed_precision=mixed_precision or file.mixed_precision,
        generations_kept=file.generations_kept,
        network_stall_seconds=file.network_stall_seconds,
    )


def _check_numbers(file: _File, path: Path) -> None:
    if file.generations_kept < 1:
        raise UsageError(f"{path}: generations_kept: found {file.generations_kept}", "accepted: 1 or more")
    if not file.network_stall_seconds > 0:  # YAML's .nan is a number, and not above 0
        raise UsageError(
            f"{path}: network_stall_seconds: found {file.network_stall_seconds}", "accepted: more than 0"
        )


def _commit(value: str, origin: str) -> str:
    if not _COMMIT.fullmatch(value.lower()):
        raise UsageError(
            f"{origin}: {value!r} is not a full commit id",
            "give all 40 hexadecimal digits (`git rev-parse NAME` prints them)",
        )
    return value.lower()


def load_profile(name: str, origin: str = "profile", config: Path = CONFIG) -> Profile:
    """Read one profile.

    Args:
        name: of a file in ``config/profiles/``.
        origin: the flag, variable or key that named it, for the error.
        config: the directory with ``profiles/``.

    Raises:
        UsageError: there is no such profile, or its file is invalid.
    """
    known = profile_names(config)
    if name not in known:
        raise UsageError(f"{origin}: there is no profile {name!r}", f"accepted: {', '.join(known)}")
    path = config / "profiles" / f"{name}.yaml"
    profile = read_yaml(path, Profile)
    releases = {"macos": profile.macos, **{f"needs_macos.{k}": v for k, v in profile.needs_macos.items()}}
    for key, release in releases.items():
        if not _RELEASE.fullmatch(release):
            raise UsageError(
                f"{path}: {key}: found {release!r}", 'accepted: a release of macOS, such as "14.0"'
            )
    return profile


def load_gui(config: Path = CONFIG) -> Gui:
    """Read ``config/gui.yaml``."""
    return read_yaml(config / "gui.yaml", Gui)


def profile_names(config: Path = CONFIG) -> list[str]:
    """The names of the profiles, in alphabetical order."""
    return sorted(path.stem for path in (config / "profiles").glob("*.yaml"))


def read_yaml(path: Path, kind: type[T], *, fix: str = "") -> T:
    """Read a YAML file into ``kind``: a struct, or a mapping such as ``dict[str, Struct]``.

    Args:
        path: the file.
        kind: what it has to contain.
        fix: what mends a file that a command writes; when left out, it is a file of this project.

    Raises:
        UsageError: it is missing, is not YAML, or does not have that shape.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _LOADER)  # noqa: S506 -- both are safe
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", fix or restores(path)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}", fix) from error
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {_explain_mismatch(str(error), data, kind)}", fix) from error


def _explain_mismatch(message: str, data: Any, kind: Any) -> str:
    """Add to msgspec's message, which names the key and the type, what was found and what is accepted."""
    problem, _, where = message.partition(" - at `")
    problem = problem[0].lower() + problem[1:]
    path = ""
    found = data
    for step in re.findall(r"\[[^\]]*\]|[^.$`\[\]]+", where.rpartition("$")[2]):
        name, found, kind = _descend(step, found, kind)
        path += name if name.startswith("[") or not path else f".{name}"
    if "unknown field" in problem or "missing required field" in problem:
        accepted = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        return f"{path + ': ' if path else ''}{problem}; accepted keys: {accepted}"
    return f"{path or 'the file'}: {problem}; found {shorten(repr(found), 200)}"


def _descend(step: str, data: Any, kind: Any) -> tuple[str, Any, Any]:
    """Go one step of msgspec's path: its name, the data and the type below it."""
    if step == "[...]":  # in a mapping msgspec does not say which key; it is the first that does not fit
        inner = get_args(kind)[-1]
        return *next((key, value) for key, value in data.items() if not _fits(value, inner)), inner
    if step.startswith("["):
        return step, data[int(step[1:-1])], next(each for each in get_args(kind) if each is not ...)
    inner = next(field.type for field in msgspec.structs.fields(kind) if field.encode_name == step)
    return step, data.get(step), inner


def _fits(data: Any, kind: Any) -> bool:
    try:
        msgspec.convert(data, kind)
    except msgspec.ValidationError:
        return False
    return True


def _override(from_file: str, variable: str, flag: str | None, file_key: str) -> tuple[str, str]:
    """The value that counts, and the name of the flag, variable or key that it came from."""
    if flag:
        value, origin = flag, f"--{variable.removeprefix('KOHYA_').lower().replace('_', '-')}"
    elif os.environ.get(variable):
        value, origin = os.environ[variable], variable
    else:
        value, origin = from_file, file_key
    if not value:
        raise UsageError(f"{origin}: found {value!r}", "accepted: any text that is not empty")
    # Bytes that are not UTF-8 arrive as lone surrogates; no report with them could be printed.
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in value):
        raise UsageError(
            f"{origin}: {value!r} has a control character or is not UTF-8", "use a name without them"
        )
    return value, origin


def _url(value: str) -> str:
    if value.startswith("-"):
        raise UsageError(f"KOHYA_REPO_URL: {value!r} is not an address", "give a URL or a path")
    path = os.path.expanduser(value)  # noqa: PTH111 -- keeps a ~ that names no user as it is
    return os.path.abspath(path) if os.path.exists(path) else value  # noqa: PTH110 -- any length


def _home(from_file: str, file_key: str) -> Path:
    value, origin = _override(from_file, "KOHYA_HOME", None, file_key)
    try:
        home = Path(os.path.abspath(Path(value).expanduser()))
        home.exists()
    except RuntimeError as error:
        raise UsageError(f"{origin}: {value!r}: {error}", "write the path in full") from error
    except OSError as error:
        raise UsageError(f"{origin}: {value!r}: {error.strerror}", "choose another path") from error
    return home


def hugging_face_home() -> Path:
    """The directory of Hugging Face's libraries: ``HF_HOME``, else one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expanduser(path))  # noqa: PTH111 -- keeps a ~ that names no user as it is


def without_secret(text: str) -> str:
    """A URL, or a text with URLs, as it may be printed and recorded: without names and passwords."""
    return re.sub(r"(https?://)[^/@\s]*@", r"\1", text)
