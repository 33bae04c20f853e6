"""Sweeps: many trainings with other settings, of which the validation split chooses one."""
