"""The files that the web page finds: its forms' values, our presets, and a program ``accelerate``.

None of them changes a file of the checkout.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tomlkit

from kohya_mps.core.files import write_atomic
from kohya_mps.core.installation import Installation
from kohya_mps.core.settings import GUI_PRESETS, Gui, read_yaml
from kohya_mps.install import accelerate_launch
from kohya_mps.install.generations import Generation

# The directory of the user's own presets in the checkout; upstream's .gitignore leaves them out.
USER_PRESETS = Path("presets", "lora", "user_presets")


def directory(home: Installation) -> Path:
    """The directory of everything that this project writes for the page."""
    return home.state / "gui"


def program_directory(home: Installation) -> Path:
    """The directory of the program ``accelerate``, first on the page's ``PATH``."""
    return directory(home) / "bin"


def write_forms(home: Installation, generation: Generation, gui: Gui) -> Path:
    """Write the values that the page's forms open with, and return the file.

    The mixed precision is that of the accelerate configuration that trainings start with.

    Raises:
        UsageError: the accelerate configuration cannot be read.
    """
    configuration = read_yaml(
        generation.accelerate_config, dict[str, object], fix="`invoke configure` writes it again"
    )
    # Without an output directory the page writes to the root of the disk (lora_gui.py, tmpfilename).
    own = {
        "accelerate_launch": {"mixed_precision": str(configuration["mixed_precision"])},
        "folders": {"output_dir": str(home.root / "outputs"), "logging_dir": str(home.root / "logs")},
    }
    sections = {name: {**gui.forms.get(name, {}), **own.get(name, {})} for name in {**gui.forms, **own}}
    path = directory(home) / "config.toml"
    write_atomic(path, toml(sections).encode())
    return path


def toml(sections: dict[str, dict[str, Any]]) -> str:
    """Sections of settings as TOML."""
    return f"# Written by `invoke gui` from config/gui.yaml.\n\n{tomlkit.dumps(sections)}"


def write_accelerate(home: Installation, generation: Generation) -> Path:
    """Write the program that the page finds when it looks for ``accelerate``.

    The page does not name a configuration (kohya_gui/lora_gui.py, ``run_cmd``). So accelerate would
    take the default one, which may belong to another project and say ``use_cpu: true``.

    Returns:
        The program's directory.
    """
    launch = shlex.join(accelerate_launch.launcher(generation))
    other = shlex.join(accelerate_launch.accelerate(generation))
    text = (
        "#!/bin/sh\n# Written by `invoke gui`: trainings that the page starts get the accelerate\n"
        "# configuration that `invoke train` uses.\n"
        f'if [ "$1" = launch ]; then\n    shift\n    exec {launch} "$@"\nfi\nexec {other} "$@"\n'
    )
    path = program_directory(home) / "accelerate"
    write_atomic(path, text.encode())
    path.chmod(0o755)
    return path.parent


def offer_presets(home: Installation) -> None:
    """Link our presets into the user's presets of the LoRA tab; the user's own files stay."""
    for preset in sorted(GUI_PRESETS.glob("*.json")):
        link = home.root / USER_PRESETS / preset.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()  # this project may have moved
        if not link.exists():
            link.symlink_to(preset)
