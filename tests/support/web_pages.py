"""A small page in place of kohya's, in a small environment that starts in a moment."""

from __future__ import annotations

import socket
import subprocess
import sys
import venv
from pathlib import Path

from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import Settings
from kohya_mps.install.generations import Generation, Manifest, activate
from kohya_mps.install.inventory import Inventory, site_packages
from tests.support.installs import make_settings

# Answers on every address with its arguments and variables, and starts a process that outlives it.
PAGE = """
import argparse, http.server, json, os, subprocess, sys
import tkinter, tkinter.font
from tkinter import *
parser = argparse.ArgumentParser()
parser.add_argument("--listen")
parser.add_argument("--server_port", type=int)
given, rest = parser.parse_known_args()
if os.environ.get("PAGE_FAILS"):
    sys.exit("the page has had enough")
training = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
answer = {"environ": dict(os.environ), "rest": rest, "cwd": os.getcwd(), "training": training.pid}

class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.environ.get("PAGE_NEVER_ANSWERS") else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

http.server.ThreadingHTTPServer((given.listen, given.server_port), Page).serve_forever()
"""

# The packages that gui_page.py and the launcher import.
STAND_INS = {
    "gradio/__init__.py": "",
    "gradio/networking.py": "",
    "httpx.py": "",
    "accelerate/__init__.py": "",
    "accelerate/commands/__init__.py": "",
    "accelerate/commands/accelerate_cli.py": "import json, sys\nprint(json.dumps(sys.argv[1:]))\n",
}


def make_installation(root: Path, *, gui: bool = True) -> Settings:
    """A home with a checkout and an active generation, whose path is one that a shell would split."""
    chosen = make_settings(root / "a home of 'mine'")
    home = Installation(chosen.home)
    generation = Generation(home.generations / "small")
    venv.create(generation.venv, symlinks=True)
    for name, text in STAND_INS.items():
        path = site_packages(generation.venv) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    generation.accelerate_config.write_text("mixed_precision: bf16\n")
    generation.complete(
        Manifest("small", "0", "3.11", sys.executable, Inventory({}, (), "", 0, ()), 0.0, gui)
    )
    activate(home, generation)
    (chosen.home / "kohya_gui.py").write_text(PAGE)
    subprocess.run(["git", "init", "--quiet", chosen.home], check=True)
    return chosen


def generation_of(chosen: Settings) -> Generation:
    return Generation(Installation(chosen.home).generations / "small")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
