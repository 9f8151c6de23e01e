from __future__ import annotations

from pathlib import Path

from devtools.rehearsal import request
from devtools.rehearsal.request import Request


def test_requests_read_back_as_they_were_written(tmp_path: Path) -> None:
    two = [
        Request("lora", "mps", "train.py", ("--lr", "1e-4"), small=True, fallback=True, result="r", log="l"),
        Request("lora", "cpu", "train.py", (), small=False, fallback=False, result="r"),
    ]
    request.write(tmp_path / "requests.json", two)
    assert request.read(tmp_path / "requests.json") == two
