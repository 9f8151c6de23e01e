"""Small real wheels, a source archive and an index of them, made in the test's own directory."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

LINUX = "cp311-cp311-manylinux_2_28_x86_64"


def only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Packages come from this folder alone, whatever pip and uv are configured to on this machine."""
    empty = folder.parent / "empty-index"
    empty.mkdir(exist_ok=True)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_DEFAULT_INDEX", empty.as_uri())
    # Not offline: uv would say "not in the cache" of what does not exist.
    monkeypatch.delenv("UV_OFFLINE", raising=False)
    monkeypatch.setenv("UV_FIND_LINKS", str(folder))


def wheel(
    folder: Path,
    name: str,
    version: str,
    *,
    tag: str = "py3-none-any",
    requires: Iterable[str] = (),
    metadata: str = "",
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A wheel that pip and uv accept; ``files`` are further members."""
    folder.mkdir(parents=True, exist_ok=True)
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    members = {
        f"{module}/__init__.py": b"",
        **(files or {}),
        f"{info}/METADATA": (
            f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{needs}{metadata}".encode()
        ),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    record = [f"{path},{_digest(content)},{len(content)}\n" for path, content in members.items()]
    members[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    path = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def _digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def source_archive(folder: Path, name: str, version: str) -> Path:
    """What is published for a package that has to be built where it is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in {
            "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "setup.py": f"from setuptools import setup; setup(name={name!r}, version={version!r})\n",
        }.items():
            entry = tarfile.TarInfo(f"{name}-{version}/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content.encode()))
    return path


def pin(path: Path) -> str:
    """The line of a lock that installs this wheel."""
    name, version = path.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"
