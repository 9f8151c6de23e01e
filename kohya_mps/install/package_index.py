"""Where packages come from: the user's pip settings, translated for uv.

uv reads its own configuration and ``UV_*`` itself. Many people have only configured pip,
for a mirror or a folder of wheels, and expect every installer to follow that.
"""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

# pip's option, uv's variables for the same (the first is set), and uv's separator of values;
# an option with an empty separator has one value.
_OPTIONS = (
    ("index-url", ("UV_DEFAULT_INDEX", "UV_INDEX_URL"), " "),
    ("find-links", ("UV_FIND_LINKS",), ","),
    ("trusted-host", ("UV_INSECURE_HOST",), " "),
    ("cert", ("SSL_CERT_FILE",), ""),
)

_MACHINE = (Path("/etc/pip.conf"),)


def for_uv(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The ``UV_*`` variables for the main sources in pip's configuration.

    A variable that the user has set for uv takes precedence.
    """
    source = os.environ if environ is None else environ
    variables: dict[str, str] = {}
    for option, names, separator in _OPTIONS:
        value = _configured(source, option)
        # uv does not expand the tilde.
        values = [os.path.expanduser(v) for v in (value.split() if separator else [value])]  # noqa: PTH111
        if any(values) and not any(name in source for name in names):
            variables[names[0]] = separator.join(values)
    return variables


def extra_for_uv(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The ``UV_*`` variables for pip's extra indexes; none if there are none, or uv has its own.

    Every package is checked against the lock's digests, so an extra index cannot bring in
    anything else. pip searches every index; uv by default stops at the first that has the name.
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
    """Whether pip is configured to use no index; uv has an option for that, but no variable."""
    source = os.environ if environ is None else environ
    return _configured(source, "no-index").lower() in ("1", "true", "yes", "on")


def _configured(environ: Mapping[str, str], option: str) -> str:
    variable = environ.get("PIP_" + option.upper().replace("-", "_"))
    return variable or dict(_from_files(environ)).get(option, "")


def _from_files(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """All [global] settings and then all [install] settings, in pip's order: the last one wins."""
    parsers = []
    for path in _files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip cannot read it either, and says so itself
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
