# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""UPerNet in use: synchronized batch norms, prediction by sliding windows and at several scales, image processor."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import SegformerImageProcessor


def share_batch_norms(model: nn.Module, num_processes: int, device: torch.device) -> nn.Module:
    """The model, with the statistics of its batch norms over all processes in training, as the original; GPUs only."""
    if num_processes == 1 or device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def segmenter_processor(crop_size: int, mean: Sequence[float], std: Sequence[float]) -> SegformerImageProcessor:
    """
    The image processor for pipelines: it resizes each image to a square of `crop_size` px, and its segmentation map
    back. `predict` keeps the aspect ratio; its sliding windows and several scales are better and slower.
    """
    size = {"height": crop_size, "width": crop_size}
    return SegformerImageProcessor(size=size, image_mean=list(mean), image_std=list(std), do_reduce_labels=False)


@torch.no_grad()
def predict(
    model: nn.Module,
    pixel_values: torch.Tensor,
    shorter_side: int,
    window: int,
    stride: int | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    multiple: int = 16,
) -> torch.Tensor:
    """
    The class probabilities of each pixel of one image, the mean over scales and mirror images.

    Args:
        model: a segmentation model in eval mode; it returns `logits` (B, classes, H, W).
        pixel_values: (channels, H, W), any size.
        shorter_side: in px, that the image is resized to for the scale 1.
        window: side in px of the sliding windows.
        stride: of the sliding windows in px; the whole image at once if not given.
        scales: of the image.
        flip: whether to average over the mirror image too.
        multiple: that heights and widths are padded to.

    Returns:
        (classes, H, W), float32.
    """
    size = pixel_values.shape[1:]
    total = 0.0
    for scale in scales:
        factor = scale * shorter_side / min(size)
        scaled = [max(round(length * factor), 1) for length in size]
        image = pixel_values[None]
        if scaled != list(size):
            image = nn.functional.interpolate(image, scaled, mode="bilinear", align_corners=False, antialias=factor < 1)
        for mirrored in (False, True) if flip else (False,):
            pixels = image.flip(3) if mirrored else image
            logits = _slide(model, pixels, window, stride, multiple) if stride else _padded(model, pixels, multiple)
            logits = logits.flip(3) if mirrored else logits
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
            total = total + logits.softmax(dim=1)
    return total[0] / (len(scales) * (1 + flip))


def _slide(model: nn.Module, image: torch.Tensor, window: int, stride: int, multiple: int) -> torch.Tensor:
    """The mean logits of all windows that a pixel is in; the last of a row or column ends with the image."""
    height, width = image.shape[2:]
    total, times = 0.0, image.new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            logits = _padded(model, image[place], multiple)
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[place] += logits
            times[place] += 1
    return total / times


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    last = max(length - window, 0)
    yield from range(0, last, stride)
    yield last


def _padded(model: nn.Module, image: torch.Tensor, multiple: int) -> torch.Tensor:
    """The logits of an image that is padded with the mean color, on the right and below, for the model."""
    height, width = image.shape[2:]
    filled = nn.functional.pad(image, (0, -width % multiple, 0, -height % multiple))
    return model(pixel_values=filled).logits.float()[..., :height, :width]
