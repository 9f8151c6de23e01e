"""Scripts that run under the trainer's interpreter and import only what the locks install."""
