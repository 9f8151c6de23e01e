"""The simulated MPS device: runs under the trainer's interpreter and imports only what its lock installs."""
