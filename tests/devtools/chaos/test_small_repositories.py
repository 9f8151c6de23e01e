from __future__ import annotations

from pathlib import Path

import pytest

from devtools.chaos import small_repositories
from kohya_mps.install import checkout
from tests.support.installs import make_settings


def test_the_stand_in_can_be_checked_out_with_its_submodule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("COUNT", "1"), ("KEY_0", "protocol.file.allow"), ("VALUE_0", "always")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    chosen = small_repositories.make(tmp_path, make_settings(tmp_path / "home"))
    checkout.ensure_checkout(chosen)
    assert (chosen.home / "kohya_gui.py").is_file()
    assert (chosen.home / "sd-scripts" / "train_network.py").is_file()
