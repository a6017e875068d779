"""What surrounds a run: options, plan, order of the records, checkpoints, features, the check of a list."""
