"""What will go wrong, told before it does: of the machine, and of a training."""
