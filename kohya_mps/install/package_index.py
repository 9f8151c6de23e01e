"""Where packages come from: the user's own pip settings, told to uv.

uv reads its own configuration and ``UV_*`` itself. Many people have configured pip alone,
for a mirror or a folder of wheels, and expect every installer to follow it.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

# pip's option, uv's variables for the same (the first is the one that is set), and what
# stands between several values there.
_OPTIONS = (
    ("index-url", ("UV_DEFAULT_INDEX", "UV_INDEX_URL"), " "),
    ("find-links", ("UV_FIND_LINKS",), ","),
    ("trusted-host", ("UV_INSECURE_HOST",), " "),
    ("cert", ("SSL_CERT_FILE",), ""),
)

_MACHINE = (Path("/etc/pip.conf"),)


def for_uv(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The ``UV_*`` variables that say what pip's configuration says of its main sources.

    A variable that the user set for uv wins over pip's.
    """
    source = os.environ if environ is None else environ
    told: dict[str, str] = {}
    for option, variables, separator in _OPTIONS:
        value = _configured(source, option)
        # uv does not know the tilde.
        values = [os.path.expanduser(v) for v in (value.split() if separator else [value])]  # noqa: PTH111
        if any(values) and not any(variable in source for variable in variables):
            told[variables[0]] = separator.join(values)
    return told


def extra_for_uv(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The same for pip's extra indexes; nothing when there are none, or uv has its own.

    Every package is checked against the lock's digests, so an extra index cannot bring in
    anything else. pip looks in every index; uv would stop at the first that knows the name.
    """
    source = os.environ if environ is None else environ
    indexes = _configured(source, "extra-index-url").split()
    if not indexes or no_index(source) or "UV_INDEX" in source or "UV_EXTRA_INDEX_URL" in source:
        return {}
    return {
        "UV_INDEX": " ".join(indexes),
        "UV_INDEX_STRATEGY": source.get("UV_INDEX_STRATEGY", "unsafe-best-match"),
    }


def no_index(environ: Mapping[str, str] | None = None) -> bool:
    """Whether pip is told to ask no index: uv has an option for it, and no variable."""
    source = os.environ if environ is None else environ
    return _configured(source, "no-index").lower() in ("1", "true", "yes", "on")


def _configured(environ: Mapping[str, str], option: str) -> str:
    variable = environ.get("PIP_" + option.upper().replace("-", "_"))
    return variable or dict(_from_files(environ)).get(option, "")


def _from_files(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Settings of all [global] and then all [install] sections, in pip's order: the last one wins."""
    parsers = []
    for path in _files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip itself will say so; what we install does not depend on it
        parsers.append(parser)
    for section in ("global", "install"):
        for parser in parsers:
            if parser.has_section(section):
                yield from ((key.replace("_", "-"), value) for key, value in parser.items(section))


def _files(environ: Mapping[str, str]) -> list[Path]:
    chosen = environ.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    machine = [*_MACHINE, *(Path(p) / "pip.conf" for p in _site_directories())]
    user = [Path.home() / ".pip" / "pip.conf", Path.home() / ".config" / "pip" / "pip.conf"]
    user.append(Path(platformdirs.user_config_dir("pip", appauthor=False)) / "pip.conf")
    own = [Path(sys.prefix) / "pip.conf"]
    return [*machine, *user, *own, *([Path(chosen)] if chosen else [])]


def _site_directories() -> list[str]:
    return platformdirs.site_config_dir("pip", appauthor=False, multipath=True).split(os.pathsep)
