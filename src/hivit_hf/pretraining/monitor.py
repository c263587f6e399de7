# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Reconstructions of validation images, drawn while pre-training runs."""

import torch
from matplotlib.figure import Figure

from ..training.figures import INK, new_figure


def reconstruction_grid(
    originals: torch.Tensor, bool_masked_pos: torch.BoolTensor, reconstructions: torch.Tensor, patch_size: int
) -> Figure:
    """
    Three rows of images: the originals, what the encoder saw (masked units gray), and the reconstructions.

    Args:
        originals: (B, 3, H, W), values in [0, 1]; all of them are shown.
        bool_masked_pos: (B, N), True = masked.
        reconstructions: (B, 3, H, W), values outside [0, 1] are clipped.
        patch_size: side of a unit in px.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
        raise ValueError(
            "originals and reconstructions must both have the shape (B, 3, H, W), got "
            f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}."
        )
    batch, _, height, width = originals.shape
    grid = height // patch_size, width // patch_size
    if tuple(bool_masked_pos.shape) != (batch, grid[0] * grid[1]):
        raise ValueError(
            f"bool_masked_pos must have the shape {(batch, grid[0] * grid[1])} for units of {patch_size} px, got "
            f"{tuple(bool_masked_pos.shape)}."
        )
    masked_pixels = bool_masked_pos.unflatten(1, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    masked = torch.where(masked_pixels[:, None], torch.tensor(0.55), originals)
    figure = new_figure(width=0.86 * batch + 1.1, height=0.86 * 3)
    rows = [("original", originals), ("masked", masked), ("reconstructed", reconstructions)]
    for row, (name, images) in enumerate(rows):
        for column, image in enumerate(images):
            axes = figure.add_subplot(3, batch, row * batch + column + 1)
            axes.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, fontsize=10, color=INK)
    return figure
