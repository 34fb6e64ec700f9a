"""Pure functions of training: schedules, losses, metrics, state, steps; and checkpoints."""
