"""Run kohya_ss's page unchanged, with two things made right around it.

usage: gui_page.py kohya_gui.py [ITS OPTIONS]

Gradio looks whether its own page answers, five times for three seconds, and gives up
(gradio 5.50.0, networking.py, url_ok). This page has 3,000 fields: the first answer is a second
of work for one core, and on a busy machine the page never starts. Here it looks once, with time.

kohya_ss imports easygui, which imports tkinter, which some Pythons do not have. With
``--headless`` there are no file dialogs; what stands in for it says so if it is used after all.
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
from gradio import networking

PATIENCE_SECONDS = 300


class Absent:
    """Whatever a module of tkinter's would hold."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("this Python has no tkinter, so there are no dialogs: type the path instead")


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> type[Absent]:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


def stand_in() -> None:
    """Make ``import tkinter``, and what easygui imports of it, succeed."""
    whole = _StandIn("tkinter")
    whole.__path__ = []
    sys.modules["tkinter"] = whole
    for name in ("filedialog", "font"):
        part = _StandIn(f"tkinter.{name}")
        setattr(whole, name, part)
        sys.modules[part.__name__] = part


def answers(url: str) -> bool:
    """In place of gradio's ``url_ok``."""
    try:
        # A proxy has no way to this machine's own addresses.
        asked = httpx.head(url, timeout=PATIENCE_SECONDS, verify=False, trust_env=False)  # noqa: S501
        return bool(asked.is_success)
    except httpx.HTTPError:
        return False


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    if importlib.util.find_spec("_tkinter") is None:
        stand_in()
    networking.url_ok = answers
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
