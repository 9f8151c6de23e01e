"""The pictures and captions that a training uses."""
