"""The laboratory: a small world, tiny towers, and the experiment that compares the losses (README.md)."""
