"""Studies: many trainings that differ in one thing, as one command with one table."""
