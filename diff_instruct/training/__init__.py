"""A run: arguments, methods, optimizers, checkpoints, history."""
