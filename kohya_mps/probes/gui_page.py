"""Run kohya_ss's page unchanged, and correct two things around it.

usage: gui_page.py kohya_gui.py [ITS OPTIONS]

Gradio checks five times, for three seconds each, whether its own page answers, and then gives up
(gradio 5.50.0, networking.py, url_ok). This page has 3,000 fields, and its first answer is a second
of work for one core: on a busy machine it never starts. Here it is checked once, with a long timeout.

kohya_ss imports easygui, which imports tkinter, which some Pythons do not have. With ``--headless``
there are no file dialogs, so a replacement is enough; it raises an error if it is used anyway.
"""

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
from gradio import networking

ANSWER_SECONDS = 300


class Absent:
    """Replaces every name in tkinter's modules."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("this Python has no tkinter, so there are no dialogs: type the path instead")


class _EmptyModule(ModuleType):
    def __getattr__(self, name: str) -> type[Absent]:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


def replace_tkinter() -> None:
    """Make the imports of tkinter and of the parts that easygui uses succeed."""
    package = _EmptyModule("tkinter")
    package.__path__ = []
    sys.modules["tkinter"] = package
    for name in ("filedialog", "font"):
        module = _EmptyModule(f"tkinter.{name}")
        setattr(package, name, module)
        sys.modules[module.__name__] = module


def answers(url: str) -> bool:
    """Replaces gradio's ``url_ok``: whether the page answers."""
    try:
        # Without the environment's proxy, which cannot reach this machine's own addresses.
        response = httpx.head(url, timeout=ANSWER_SECONDS, verify=False, trust_env=False)  # noqa: S501
        return bool(response.is_success)
    except httpx.HTTPError:
        return False


def main() -> None:
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    if importlib.util.find_spec("_tkinter") is None:
        replace_tkinter()
    networking.url_ok = answers
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
