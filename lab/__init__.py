"""The laboratory: a small world, tiny towers, and the experiment that compares the losses (README.md)."""

import argparse
import sys
from contextlib import contextmanager


def parser_of(module: str, about: str) -> argparse.ArgumentParser:
    """A parser whose help shows the text `about` with its line breaks."""
    return argparse.ArgumentParser(f"python -m {module}", description=about, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


@contextmanager
def errors_in_one_line(module: str):
    """End the program with one line if a file or a value is wrong."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{module}: {str(error).strip().splitlines()[-1]}")
