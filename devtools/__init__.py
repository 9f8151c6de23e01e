"""What only contributors run; nothing in ``kohya_mps`` imports it."""
