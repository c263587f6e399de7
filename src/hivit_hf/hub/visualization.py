# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Visualizations: masked and reconstructed images, feature maps as colors."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from ..image_processing import pixel_statistics


MASK_GRAY = 140
GAP_PX = 8


def pixels_to_image(pixel_values: torch.Tensor, processor: BaseImageProcessor) -> Image.Image:
    """The image whose processed pixels these are: (3, H, W), normalized."""
    mean, std = (torch.tensor(v)[:, None, None] for v in pixel_statistics(processor, len(pixel_values)))
    levels = ((pixel_values.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def masked_image(image: Image.Image, bool_masked_pos: torch.BoolTensor, grid: tuple[int, int]) -> Image.Image:
    """The image with its masked units gray. `bool_masked_pos` (N,), True = masked, of `grid` rows and columns."""
    mask = Image.fromarray(bool_masked_pos.cpu().view(grid).to(torch.uint8).mul(255).numpy())
    image = image.copy()
    image.paste((MASK_GRAY,) * 3, mask=mask.resize(image.size, Image.Resampling.NEAREST))
    return image


def enlarged(image: Image.Image, width_px: int) -> Image.Image:
    """A small image enlarged in whole steps up to `width_px`, so that its pixels stay squares."""
    factor = max(1, width_px // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a row, on white."""
    width, height = images[0].size
    row = Image.new("RGB", ((width + GAP_PX) * len(images) - GAP_PX, height), "white")
    for number, image in enumerate(images):
        row.paste(image, (number * (width + GAP_PX), 0))
    return row


def feature_image(feature_map: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """
    A feature map as colors: its first three principal components over the image are red, green and blue, so places
    of like features have like colors.

    Args:
        feature_map: (C, rows, columns).
        size: width and height in px of the image; each place becomes a rectangle.
    """
    features = feature_map.detach().float().flatten(1).t()
    features = features - features.mean(dim=0)
    left, values, directions = torch.linalg.svd(features, full_matrices=False)
    count = min(3, len(values))
    components = torch.zeros(len(features), 3)
    # the sign of a component is arbitrary: the largest weight is made positive, so that the same image looks the same
    signs = directions[:count].gather(1, directions[:count].abs().argmax(dim=1, keepdim=True)).sign()[:, 0]
    components[:, :count] = (left[:, :count] * values[:count] * signs).cpu()
    spread = components.std(dim=0, correction=0).clamp(min=1e-6)
    levels = ((components / spread * 0.22 + 0.5) * 255).clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(levels.view(*feature_map.shape[1:], 3).numpy())
    return image.resize(size, Image.Resampling.NEAREST)
