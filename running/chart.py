"""Charts, drawn with Pillow, because one more package for some pictures would be too much.

All places and sizes are pixels of the picture that is saved.
"""

import math
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from plumbing.files import whole

ZOOM = 2  # drawn twice as large and scaled down, because Pillow's lines have no smooth edges
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # also colour-blind eyes tell them apart
DASHES = ((), (6, 2), (1.4, 2), (6, 2, 1.4, 2))  # drawn, left out, .. in widths of the line: for grey print
GREY, PALE = "#666666", "#dddddd"


class Panel(NamedTuple):
    """Where a plot stands, and the values at its edges."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple  # the values at the left and the right edge
    y: tuple  # at the bottom and the top
    is_log: bool = False  # of y

    def at(self, x: float, y: float) -> tuple:
        """The place of a value."""
        low, high = self.y
        if self.is_log:
            y, low, high = map(math.log, (y, low, high))
        up = (y - low) / (high - low)  # from 0 to 1
        first, last = self.x
        right = (x - first) / (last - first)
        x = self.left + right * (self.right - self.left)
        y = self.bottom - up * (self.bottom - self.top)
        return x, y


def sheet(width: int, height: int) -> tuple:
    """(image, draw), white."""
    image = Image.new("RGB", (width * ZOOM, height * ZOOM), "white")
    return image, ImageDraw.Draw(image)


def save(image, file):
    """Write the PNG, at the size that was asked for."""
    image = image.resize((image.width // ZOOM, image.height // ZOOM), Image.Resampling.LANCZOS)
    with whole(file) as building:
        image.save(building, "png")


def style(number: int) -> tuple:
    """(color, dashes) of a line: no two of the first twenty are equal."""
    return COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]


def line(draw, points, color: str, width: float = 1, dashes=()):
    """A line through all points, or a dot; `dashes`: how many widths are drawn and left out in turn."""
    if len(points) == 1:
        dot(draw, points[0], 1.5 * width, color, color)
    zoomed = [(x * ZOOM, y * ZOOM) for x, y in points]
    for part in dashed(zoomed, [length * width * ZOOM for length in dashes]):
        draw.line(part, color, round(width * ZOOM))


def dashed(points: list, dashes: list) -> list:
    """The parts of the line through the points that are drawn, each a list of points."""
    parts = [points[:1]]  # every second one is a gap
    left = dashes[0] if dashes else math.inf  # until the next begins
    for start, end in zip(points, points[1:]):
        length = math.dist(start, end)
        while length > left:
            part = left / length
            start = tuple(a + part * (b - a) for a, b in zip(start, end))
            length -= left
            parts[-1].append(start)
            left = dashes[len(parts) % len(dashes)]
            parts.append([start])
        left -= length
        parts[-1].append(end)
    return parts[::2]


def dot(draw, point, radius: float, color: str, fill: str):
    draw.circle((point[0] * ZOOM, point[1] * ZOOM), radius * ZOOM, fill, color, 2 * ZOOM)


def box(draw, left: float, top: float, right: float, bottom: float, fill: str, outline: str = "white"):
    draw.rectangle((left * ZOOM, top * ZOOM, right * ZOOM, bottom * ZOOM), fill, outline, ZOOM)


def write(draw, x: float, y: float, text: str, size: float = 14, anchor: str = "mm", color: str = "black"):
    """`anchor`: what of the text stands at (x, y), in Pillow's letters: "ls" its left end and its foot."""
    draw.text((x * ZOOM, y * ZOOM), text, color, ImageFont.load_default(size * ZOOM), anchor)


def frame(draw, panel: Panel, x_ticks: dict, y_ticks, size: float = 14):
    """What stands around the lines: {value: text} below, a rule for each of `y_ticks`, with its number."""
    for value in y_ticks:
        _, y = panel.at(panel.x[0], value)
        line(draw, [(panel.left, y), (panel.right, y)], PALE)
        write(draw, panel.left - 8, y, f"{value:g}", size, "rm", GREY)
    for value, text in x_ticks.items():
        x, _ = panel.at(value, panel.y[0])
        line(draw, [(x, panel.bottom), (x, panel.bottom + 4)], GREY)
        write(draw, x, panel.bottom + 6, text, size, "ma", GREY)
    line(draw, [(panel.left, panel.bottom), (panel.right, panel.bottom)], GREY)


def ticks(low: float, high: float) -> list:
    """Round numbers at even distances; the first is at most `low`, the last at least `high`."""
    if high - low <= 1e-4 * max(abs(low), abs(high)):  # one value: show it against 0
        low, high = (low, 0) if low < 0 else (0, high or 1)
    step = round_up((high - low) / 5)
    digits = max(0, -math.floor(math.log10(step)))  # otherwise 3 * 0.1 is not 0.3
    numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    return [round(number * step, digits) for number in numbers]


def round_up(value: float) -> float:
    """The next of .., 0.5, 1, 2, 5, 10, 20, .."""
    ten = 10.0 ** math.floor(math.log10(value))
    return next(multiple * ten for multiple in (1, 2, 5, 10) if multiple * ten >= value * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list:
    """1, 2, 5, 10, .. or, over more than two decades and a half, powers of ten."""
    found = []
    multiples = (1, 2, 5) if high < 300 * low else (1,)
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [multiple * 10.0**power for multiple in multiples]
    first = max(value for value in found if value <= low)
    last = min(value for value in found if value >= high)
    return [value for value in found if first <= value <= last]
