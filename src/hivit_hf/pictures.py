# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a model sees, fills in and computes, for cards and demonstrations."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor


MASK_GREY = 140
GAP_PX = 8


def pixel_statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """
    What an image processor subtracts from values in [0, 1], and what it divides by, for each channel; also where it
    leaves steps out or scales otherwise.
    """
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0  # from [0, 1]
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (list(v) if isinstance(v, (list, tuple)) else [v] * num_channels for v in (mean, std))
    return [value / scale for value in mean], [value / scale for value in std]


def pixels_to_picture(pixel_values: torch.Tensor, processor: BaseImageProcessor) -> Image.Image:
    """The picture whose processed pixels these are: (3, H, W), normalised."""
    mean, std = (torch.tensor(v)[:, None, None] for v in pixel_statistics(processor, len(pixel_values)))
    levels = ((pixel_values.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def masked_picture(picture: Image.Image, bool_masked_pos: torch.BoolTensor, grid: tuple[int, int]) -> Image.Image:
    """The picture with its masked units grey. `bool_masked_pos` (N,), True = masked, of `grid` rows and columns."""
    mask = Image.fromarray(bool_masked_pos.cpu().view(grid).to(torch.uint8).mul(255).numpy())
    picture = picture.copy()
    picture.paste((MASK_GREY,) * 3, mask=mask.resize(picture.size, Image.Resampling.NEAREST))
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in a row, on white."""
    width, height = pictures[0].size
    row = Image.new("RGB", ((width + GAP_PX) * len(pictures) - GAP_PX, height), "white")
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * (width + GAP_PX), 0))
    return row


def feature_picture(feature_map: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """
    A feature map as colours: its first three principal components over the picture are red, green and blue, so places
    of like features have like colours.

    Args:
        feature_map: (C, rows, columns).
        size: width and height in px of the picture; each place becomes a rectangle.
    """
    features = feature_map.detach().float().flatten(1).t()
    features = features - features.mean(dim=0)
    left, values, directions = torch.linalg.svd(features, full_matrices=False)
    count = min(3, len(values))
    components = torch.zeros(len(features), 3)
    # the sign of a component is arbitrary: the largest weight is made positive, so that the same picture looks the same
    signs = directions[:count].gather(1, directions[:count].abs().argmax(dim=1, keepdim=True)).sign()[:, 0]
    components[:, :count] = (left[:, :count] * values[:count] * signs).cpu()
    spread = components.std(dim=0, correction=0).clamp(min=1e-6)
    levels = ((components / spread * 0.22 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(levels.view(*feature_map.shape[1:], 3).numpy())
    return picture.resize(size, Image.Resampling.NEAREST)
