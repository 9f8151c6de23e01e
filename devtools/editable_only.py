"""Refuses to build a wheel of this project; pip runs it while it installs (``pyproject.toml``)."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableOnly(BuildHookInterface):
    """Lets ``pip install -e .`` pass and stops every other build of a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Check the kind of wheel that hatchling is about to build.

        Raises:
            RuntimeError: The wheel is not an editable one.
        """
        if version != "editable":
            raise RuntimeError(
                "kohya-mps works from its repository only: a wheel would lack config/, constraints/, tasks.py "
                "and noxfile.py. Install it with `pip install -e .`, in a clone that stays where it is."
            )
