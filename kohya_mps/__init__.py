"""From a bare Mac to a verified kohya_ss training step: one module per step."""

__version__ = "0.2.0"
