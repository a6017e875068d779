"""Draws the first questions of a benchmark with their answers: what a scored run says, at a glance.

    python eval.py --bench scienceqa --ckpt runs/tiny/align  # writes runs/tiny/align/scienceqa.json
    python -m lab.answers runs/tiny/align scienceqa          # draws runs/tiny/align/scienceqa.png from it
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import data
from benchmarks.questions import LETTER_ANSWER, SHORT_ANSWER
from lab import parser_of
from plumbing.files import read_json
from plumbing.ranks import command

COLUMNS, ROWS = 4, 2
SIDE, HEIGHT, LINE = 250, 110, 15  # pixels: a cell's side, the height of a picture and of a line of text


def contact_sheet(predictions, file):
    """A PNG of the first predictions with a picture: picture, question, and answer, green if it is right."""
    shown = [prediction for prediction in predictions if prediction["image"]][: COLUMNS * ROWS]
    sheet = Image.new("RGB", (COLUMNS * SIDE, math.ceil(len(shown) / COLUMNS) * SIDE), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(12)
    for i, prediction in enumerate(shown):
        row, column = divmod(i, COLUMNS)
        x, y = column * SIDE + 8, row * SIDE + 8
        image = data.load_image(prediction["image"])
        width = max(1, HEIGHT * image.width // image.height)
        sheet.paste(image.resize((width, HEIGHT)), (x, y))
        asked = prediction["prompt"].removeprefix(f"{data.IMAGE}\n")
        asked = asked.removesuffix(LETTER_ANSWER).removesuffix(SHORT_ANSWER)
        y += HEIGHT + 6
        for text in asked.split("\n")[:6]:
            draw.text((x, y), text[:38], "black", font)
            y += LINE
        color = "green" if prediction["choice"] == prediction["answer"] else "red"
        answer = prediction["text"].replace("\n", " ")
        draw.text((x, y), answer[:38], color, font)
    sheet.save(file)


def main(argv=None):
    parser = parser_of("lab.answers", __doc__)
    parser.add_argument("run", type=Path, help="a run directory that eval.py has scored")
    parser.add_argument("bench", help="the benchmark, such as scienceqa")
    args = parser.parse_args(argv)
    file = args.run / f"{args.bench}.png"
    with command("lab.answers"):
        predictions = read_json(args.run / f"{args.bench}.json")["predictions"]
        if not any(prediction["image"] for prediction in predictions):
            raise ValueError(f"{args.run}: no question of {args.bench} has a picture")
        contact_sheet(predictions, file)
    print(file)


if __name__ == "__main__":
    main()
