"""From a bare Mac to a verified kohya_ss training step: one module per step."""
