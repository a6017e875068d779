"""The laboratory: a small world, tiny towers, and the experiment that compares the losses (README.md)."""

import argparse


def parser_of(module: str, about: str) -> argparse.ArgumentParser:
    """A parser whose help shows the text `about` with its line breaks."""
    return argparse.ArgumentParser(f"python -m {module}", description=about, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
