# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""UPerNet on a HiViT: made from a start, and run on images of any size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, SegformerImageProcessor, UperNetConfig, UperNetForSemanticSegmentation

from ..configuration_hivit import HiViTConfig, nearest_multiples
from ..modeling_hivit import HiViTBackbone
from ..training.initialization import (
    PYRAMID,
    DenseStart,
    check_architecture,
    load_fitting,
    normalization,
    pyramid_config,
    pyramid_start,
    read_config,
    resize_for,
)


@dataclass(frozen=True)
class SegmenterStart:
    """
    What a segmenter begins with.

    Args:
        model: UPerNet with a HiViT inside, and the names of the classes in its configuration.
        mean, std: of each channel, as the start has learned from.
        notes: what a user should know, a sentence each.
    """

    model: UperNetForSemanticSegmentation
    mean: list[float]
    std: list[float]
    notes: list[str]


def new_segmenter(
    start: DenseStart,
    names: Sequence[str],
    head_channels: int = 512,
    auxiliary_channels: int = 256,
    auxiliary_weight: float = 0.4,
) -> SegmenterStart:
    """
    UPerNet (arXiv 1807.10221) with new heads on a pyramid: strides 4, 8, 16 and 32 for patches of 16 px.

    Args:
        start: the pyramid, which becomes a part of the model.
        names: of the classes.
        head_channels: width of the decoder.
        auxiliary_channels: width of the auxiliary head, which reads stage 3.
        auxiliary_weight: of its loss; 0 for no such head.
    """
    config = UperNetConfig(
        backbone_config=start.backbone.config,
        hidden_size=head_channels,
        use_auxiliary_head=auxiliary_weight > 0,
        auxiliary_loss_weight=float(auxiliary_weight),
        auxiliary_channels=auxiliary_channels,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(start.backbone.state_dict())
    return SegmenterStart(model, start.mean, start.std, start.notes)


def load_segmenter(
    name: str,
    names: Sequence[str],
    architecture: str | None = None,
    changes: dict | None = None,
    crop_size: int | None = None,
    **head,
) -> SegmenterStart:
    """
    A segmenter from a folder or a repository of the Hub: of a HiViT of any kind, with new heads, or of a segmenter with
    the same classes and heads, as it is.

    Args:
        name: where.
        names: of the classes.
        architecture, changes: as in `pyramid_start`.
        crop_size: side of the images in px that position embedding and relative tables are interpolated to.
        head: as in `new_segmenter`; what is given must be what a segmenter has.

    Raises:
        ValueError: if there is no HiViT, it is another network than the recipe's, weights, classes or heads do not fit.
    """
    if _is_segmenter(name):
        return _load_whole(name, names, architecture, changes, crop_size, **head)
    start = pyramid_start(name, architecture, changes)
    if crop_size is not None:
        resize_pyramid(start.backbone, crop_size)
    return new_segmenter(start, names, **head)


def check_segmenter(name: str):
    """ValueError if a folder or a repository of the Hub has no heads that were trained."""
    if not _is_segmenter(name):
        read_config(name)
        raise ValueError(
            f"{name} is no segmenter, and --evaluate_only would judge heads that have learned nothing: train one "
            "first, or give the folder of one."
        )


def _is_segmenter(name: str) -> bool:
    try:
        return AutoConfig.from_pretrained(name).model_type == UperNetConfig.model_type
    except (OSError, ValueError):
        return False  # `read_config` says what it is


def _load_whole(
    name: str,
    names: Sequence[str],
    architecture: str | None,
    changes: dict | None,
    crop_size: int | None,
    **head,
) -> SegmenterStart:
    config = AutoConfig.from_pretrained(name)
    if getattr(config.backbone_config, "model_type", None) != HiViTConfig.model_type:
        raise ValueError(f"{name} is no UPerNet with a HiViT inside: choose another start.")
    known = [config.id2label[number] for number in range(config.num_labels)]
    if known != list(names):
        raise ValueError(
            f"The segmenter {name} has the {len(known)} classes {', '.join(known[:5])} ..., not the {len(names)} of "
            "this dataset: give the same --label_names, or begin with a HiViT."
        )
    if architecture is not None:
        check_architecture(config.backbone_config, architecture, name)
    _check_heads(config, name, head)
    stages = {name: getattr(config.backbone_config, name) for name in PYRAMID}
    config.backbone_config = pyramid_config(config.backbone_config, **stages | (changes or {}))
    model, notes = load_fitting(UperNetForSemanticSegmentation, name, config)
    if crop_size is not None:
        resize_pyramid(model.backbone, crop_size)
    mean, std = normalization(name, config.backbone_config.num_channels)
    return SegmenterStart(model, mean, std, notes)


def _check_heads(config: UperNetConfig, name: str, given: dict):
    has = {"head_channels": config.hidden_size, "auxiliary_weight": 0.0, "auxiliary_channels": 0}
    if config.use_auxiliary_head:
        has |= {"auxiliary_weight": config.auxiliary_loss_weight, "auxiliary_channels": config.auxiliary_channels}
    for key, value in given.items():
        if value != has[key]:
            raise ValueError(
                f"The segmenter {name} has {key} {has[key]}, not {value}: leave out --{key}, or begin with a HiViT."
            )


def resize_pyramid(backbone: HiViTBackbone, crop_size: int):
    """Interpolates position embedding and relative tables to crops. ValueError for crops that no units fill."""
    patch_size = backbone.config.patch_size
    if crop_size % patch_size:
        raise ValueError(
            f"crop_size must be a multiple of the patch size {patch_size}, got {crop_size}: take "
            f"{nearest_multiples(crop_size, patch_size)}."
        )
    resize_for(backbone, crop_size)


def share_batch_norms(model: nn.Module, num_processes: int, device: torch.device) -> nn.Module:
    """The model, whose batch norms count the images of all processes while training, as the original's; GPUs only."""
    if num_processes == 1 or device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def segmenter_processor(crop_size: int, mean: Sequence[float], std: Sequence[float]) -> SegformerImageProcessor:
    """
    What makes pixels of a image for pipelines: it is squeezed to a square of `crop_size` px, and the class map back.
    `predict` keeps the shape; its sliding windows and several scales are better and slower.
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
        model: a segmenter in eval mode; it returns `logits` (B, classes, H, W).
        pixel_values: (channels, H, W), any size.
        shorter_side: in px, that the image is resized to for the scale 1.
        window: side in px of the squares that slide over the image.
        stride: from one square to the next in px; the whole image at once if not given.
        scales: of the image.
        flip: whether its mirror image is looked at too.
        multiple: that heights and widths of what the model sees are padded to.

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
            seen = image.flip(3) if mirrored else image
            logits = _slide(model, seen, window, stride, multiple) if stride else _padded(model, seen, multiple)
            logits = logits.flip(3) if mirrored else logits
            logits = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
            total = total + logits.softmax(dim=1)
    return total[0] / (len(scales) * (1 + flip))


def _slide(model: nn.Module, image: torch.Tensor, window: int, stride: int, multiple: int) -> torch.Tensor:
    """The mean logits of all squares that a pixel is in; the last of a row or column ends with the image."""
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
    """The logits of a image whose right and lower edge are filled up with the mean color for the model."""
    height, width = image.shape[2:]
    filled = nn.functional.pad(image, (0, -width % multiple, 0, -height % multiple))
    return model(pixel_values=filled).logits.float()[..., :height, :width]
