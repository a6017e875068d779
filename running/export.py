"""Write a run as a folder that transformers and servers open: `python -m running.export RUN FOLDER`.

The weights keep the dtype in which they were trained.
"""

import argparse
from pathlib import Path

from plumbing.files import resolve_model
from plumbing.llava import describe, find_projector, read_projector
from plumbing.ranks import command
from projector import VLM
from running.directory import latest


def export(run, folder):
    """Export a run, or any model that VLM.from_pretrained opens, to a folder that is new or empty."""
    folder = Path(folder)
    run = latest(resolve_model(run))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; nothing is written over what is there")
    describe(run)  # tells what is wrong with a folder of something else
    _, trained = next(read_projector(find_projector(run)))
    vlm = VLM.from_pretrained(run, trained.dtype)
    vlm.export(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"wrote {folder}: transformers' LLaVA format, {size / 2**20:.1f} MiB")
    print(f"next: transformers serve {folder.absolute()}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m running.export", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run, or another model that opens (folder or Hub id)")
    parser.add_argument("folder", help="new or empty")
    with command("running.export"):
        export(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
