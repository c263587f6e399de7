# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Class maps as people look at them: colored, over the image, beside the truth."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from .data import IGNORED


_GAP_PX = 6
_BACKGROUND = ("background", "other")  # names of classes that are no thing of their own
_FAINT = (0.5, 0.5, 0.5, 0.3)
_GOLDEN_ANGLE = 0.618034  # of a turn: hues that follow each other are far apart


def palette(names: Sequence[str], opacity: float = 0.6) -> np.ndarray:
    """
    A color for each class: (classes, 4), uint8, the last of them the opacity. What is only background is a faint gray.

    Args:
        names: of the classes.
        opacity: of all other classes.
    """
    colors = [
        _FAINT if name.lower() in _BACKGROUND else (*_color(number), opacity) for number, name in enumerate(names)
    ]
    return np.round(np.array(colors) * 255).astype(np.uint8)


def _color(number: int) -> tuple[float, float, float]:
    saturation, value = (0.9, 0.55)[number // 12 % 2], (1.0, 0.75)[number // 24 % 2]
    return colorsys.hsv_to_rgb(number * _GOLDEN_ANGLE % 1, saturation, value)


def overlay(image: PILImage.Image, class_map: np.ndarray, colors: np.ndarray) -> PILImage.Image:
    """
    A image with its class map laid over it; what is not labeled stays as it is.

    Args:
        image: any mode.
        class_map: (H, W), class numbers and `IGNORED`.
        colors: (classes, 4), as of `palette`.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    labeled = class_map != IGNORED
    laid = colors[class_map[labeled]]
    opacity = laid[:, 3:] / 255
    pixels[labeled] = (1 - opacity) * pixels[labeled] + opacity * laid[:, :3]
    return PILImage.fromarray(np.round(pixels).astype(np.uint8))


def overlay_sheet(
    samples: Sequence[tuple[PILImage.Image, np.ndarray, np.ndarray]], names: Sequence[str], tile_px: int = 256
) -> PILImage.Image:
    """
    One row per sample, with the image, the truth and the prediction, and below the colors of what occurs.

    Args:
        samples: images with their true and predicted class maps, (H, W) each.
        names: of the classes.
        tile_px: longer side of each image.
    """
    colors, font = palette(names), ImageFont.load_default(14)
    titles, line = ("image", "truth", "prediction"), 20
    occurring = np.unique(np.concatenate([np.concatenate([t.ravel(), p.ravel()]) for _, t, p in samples]))
    occurring = [int(number) for number in occurring if number != IGNORED]
    rows = [
        [_tile(shown, tile_px) for shown in (image, *(overlay(image, m, colors) for m in maps))]
        for image, *maps in samples
    ]
    width = 3 * tile_px + 4 * _GAP_PX
    places = _legend([names[number] for number in occurring], width, line, font)
    heights = [max(tile.height for tile in row) for row in rows]
    top = line + _GAP_PX
    legend_top = top + sum(heights) + _GAP_PX * len(heights)
    sheet = PILImage.new("RGB", (width, legend_top + line * (1 + max(row for row, _ in places)) + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [_GAP_PX + column * (tile_px + _GAP_PX) for column in range(3)]
    for left, title in zip(lefts, titles):
        draw.text((left, _GAP_PX // 2), title, fill="black", font=font)
    for row, height in zip(rows, heights):
        for left, tile in zip(lefts, row):
            sheet.paste(tile, (left, top))
        top += height + _GAP_PX
    for number, (row, left) in zip(occurring, places):
        y = legend_top + row * line
        draw.rectangle((left, y + 2, left + 13, y + 15), fill=tuple(colors[number, :3].tolist()), outline="black")
        draw.text((left + 18, y), names[number], fill="black", font=font)
    return sheet


def _tile(image: PILImage.Image, tile_px: int) -> PILImage.Image:
    factor = tile_px / max(image.size)
    return image.convert("RGB").resize([max(round(length * factor), 1) for length in image.size])


def _legend(names: Sequence[str], width: int, line: int, font) -> list[tuple[int, int]]:
    """The line, and the px from the left, of each name."""
    places, row, left = [], 0, _GAP_PX
    for name in names:
        needed = 18 + round(font.getlength(name)) + 14
        if left + needed > width and left > _GAP_PX:
            row, left = row + 1, _GAP_PX
        places.append((row, left))
        left += needed
    return places
