"""Training: the loss, the arguments, the Trainer subclass and its checkpoints."""
