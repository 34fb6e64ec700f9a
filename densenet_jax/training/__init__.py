"""Pure functions of training: schedules, losses, metrics, augmentation, state, steps; and checkpoints."""
