"""Curves of runs: to be written."""


def draw(runs: list, file):
    """Draw the log.jsonl of each folder of `runs` into the PNG `file`."""
