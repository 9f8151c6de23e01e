"""The settings of a training, in every format that people have: reading, checking, correcting."""
