"""A picture of the first questions of a benchmark with their answers: what a scored run says, at a glance.

    python eval.py --bench scienceqa --ckpt runs/tiny/align  # writes runs/tiny/align/scienceqa.json
    python -m lab.answers runs/tiny/align scienceqa          # draws runs/tiny/align/scienceqa.png from it
"""

import argparse
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER
from plumbing.files import read_json


def contact_sheet(predictions, file, columns: int = 4, rows: int = 2):
    """A PNG of the first predictions with a picture: picture, question, answer in green where it is right."""
    shown = [prediction for prediction in predictions if prediction["image"]][: columns * rows]
    side, height, line = 250, 110, 15  # pixels: a cell's side, the height of a picture and of a line of text
    sheet = Image.new("RGB", (columns * side, math.ceil(len(shown) / columns) * side), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, prediction in enumerate(shown):
        x, y = i % columns * side + 8, i // columns * side + 8
        image = data.load_image(prediction["image"])
        sheet.paste(image.resize((max(1, height * image.width // image.height), height)), (x, y))
        asked = prediction["prompt"].removeprefix(f"{data.IMAGE}\n")
        asked = asked.removesuffix(LETTER_ANSWER).removesuffix(SHORT_ANSWER).split("\n")[:6]
        is_right = prediction["choice"] == prediction["answer"]
        colors = ["black"] * len(asked) + ["green" if is_right else "red"]
        for number, text in enumerate([*asked, prediction["text"].replace("\n", " ")]):
            draw.text((x, y + height + 6 + number * line), text[:38], colors[number], font)
    sheet.save(file)


def main(argv=None):
    parser = argparse.ArgumentParser("python -m lab.answers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory that eval.py has scored")
    parser.add_argument("bench", help="the benchmark, such as scienceqa")
    args = parser.parse_args(argv)
    file = args.run / f"{args.bench}.png"
    try:
        predictions = read_json(args.run / f"{args.bench}.json")["predictions"]
        if not any(prediction["image"] for prediction in predictions):
            raise ValueError(f"{args.run}: no question of {args.bench} has a picture")
        contact_sheet(predictions, file)
    except (OSError, ValueError) as error:
        sys.exit(f"lab.answers: {error}")
    print(file)


if __name__ == "__main__":
    main()
