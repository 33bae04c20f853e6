"""Ray Train: workers, tasks, checkpoints, resume."""
