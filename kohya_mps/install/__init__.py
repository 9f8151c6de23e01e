"""From an empty directory to a verified training step, and back."""
