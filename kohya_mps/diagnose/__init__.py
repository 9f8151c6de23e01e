"""What will go wrong with a machine or a training, before it does."""
