"""A training's settings, in every format that people have: read, typed, corrected."""
