# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What a model's folder needs besides its weights."""

from collections.abc import Sequence

from transformers import BitImageProcessor


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def evaluation_resize(image_size: int, crop_pct: float | None = None) -> int:
    """The shorter side in px that a picture is resized to before the middle `crop_pct` of it is cut out."""
    if crop_pct is None:
        crop_pct = 1.0 if image_size > 224 else 0.875
    return int(image_size / crop_pct)


def evaluation_processor(
    image_size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_pct: float | None = None,
) -> BitImageProcessor:
    """
    The published evaluation transform: bicubic to size / 0.875 and the middle of it; above 224 px the whole picture, as
    in MAE's fine-tuning.

    Args:
        image_size: side in px of what the model sees.
        mean, std: of each channel, of values in [0, 1].
        crop_pct: share of the resized picture's shorter side that the model sees; the published one if not given.
    """
    return BitImageProcessor(
        size={"shortest_edge": evaluation_resize(image_size, crop_pct)},
        crop_size={"height": image_size, "width": image_size},
        resample=3,  # bicubic
        image_mean=list(mean),
        image_std=list(std),
    )
