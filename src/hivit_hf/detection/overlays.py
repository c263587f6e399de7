# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images with annotated and detected objects: boxes, masks, names and scores."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from ..training.figures import palette


_COLUMNS, _TILE_PX, _TITLE_PX, _GAP_PX = 4, 320, 16, 6


def draw_detections(
    items: Sequence[dict], found: Sequence[dict], names: Sequence[str], threshold: float = 0.5
) -> Image.Image:
    """
    Images in pairs of rows: the annotated objects, and below them the detected ones with their scores.

    Args:
        items: of `CocoImages`, as they are in the files.
        found: for each its detections.
        names: of the classes; label 1 is the first.
        threshold: detections with a lower score are not drawn.
    """
    columns, tiles = min(len(items), _COLUMNS), []
    kept = [{name: values.cpu()[one["scores"].cpu() >= threshold] for name, values in one.items()} for one in found]
    for first in range(0, len(items), columns):
        row = items[first : first + columns]
        for title, objects in (("annotated", row), ("detected", kept[first : first + columns])):
            drawn = [draw_objects(item["image"], one, names) for item, one in zip(row, objects)]
            tiles += [_titled(image, title) for image in drawn]
            tiles += [torch.full_like(tiles[-1], 255)] * (columns - len(row))
    height = max(tile.shape[1] for tile in tiles)
    padded = [functional.pad(tile, [0, 0, _TILE_PX - tile.shape[2], height - tile.shape[1]], 255) for tile in tiles]
    return functional.to_pil_image(make_grid(padded, nrow=columns, padding=_GAP_PX, pad_value=255))


def draw_objects(image: torch.Tensor, objects: dict, names: Sequence[str]) -> torch.Tensor:
    """
    An image with boxes, names, scores and masks, its longer side `_TILE_PX`.

    Args:
        image: (channels, H, W), uint8.
        objects: `boxes`, `labels`, and `scores` and `masks` if there are any.
        names: of the classes; label 1 is the first.
    """
    image = torch.as_tensor(image)
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    factor = _TILE_PX / max(image.shape[1:])
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    image = functional.resize(image, size)
    labels, of_class = objects["labels"].tolist(), palette(names)[:, :3].tolist()
    colors = [tuple(of_class[label - 1]) for label in labels]
    texts = [names[label - 1] for label in labels]
    if "scores" in objects:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, objects["scores"].tolist())]
    for mask, color in zip(torch.as_tensor(objects.get("masks", [])), colors):
        mask = functional.resize(mask[None].byte(), size, functional.InterpolationMode.NEAREST)[0].bool()
        image = draw_segmentation_masks(image, mask, alpha=0.45, colors=color)
    if not labels:
        return image
    ink = ["black" if 0.299 * r + 0.587 * g + 0.114 * b > 150 else "white" for r, g, b in colors]  # by luma
    boxes = torch.as_tensor(objects["boxes"]) * factor
    return draw_bounding_boxes(image, boxes, texts, colors, width=2, label_colors=ink, fill_labels=True)


def _titled(image: torch.Tensor, title: str) -> torch.Tensor:
    tile = functional.to_pil_image(functional.pad(image, [0, _TITLE_PX, 0, 0], 255))
    ImageDraw.Draw(tile).text((1, 1), title, fill="black")
    return functional.pil_to_tensor(tile)
