# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image processors: the published evaluation transform, the processor of a model, pixel statistics."""

from collections.abc import Sequence
from pathlib import Path

from transformers import BitImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file, logging

from .configuration_hivit import HiViTConfig
from .image_reading import read_processor


logger = logging.get_logger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def evaluation_resize(image_size: int, crop_pct: float | None = None) -> int:
    """Shorter side in px that an image is resized to before the center crop of `crop_pct` of it."""
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
    The published evaluation transform: bicubic resize to size / 0.875 and center crop; above 224 px no crop, as in
    MAE's fine-tuning.

    Args:
        image_size: side in px of the model's input.
        mean, std: of each channel, of values in [0, 1].
        crop_pct: fraction of the resized image's shorter side that is kept; the published one if not given.
    """
    return BitImageProcessor(
        size={"shortest_edge": evaluation_resize(image_size, crop_pct)},
        crop_size={"height": image_size, "width": image_size},
        resample=3,  # bicubic
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=len(mean) == 3,
    )


def first_line(error: Exception) -> str:
    """What an error of a library says, as a sentence of one line."""
    if "weights_only" in str(error):  # torch's words recommend to run what a hostile pickle holds
        return "it is damaged, or holds pickled objects other than tensors, which are never loaded."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return text if text.endswith(".") else f"{text}."


def find_processor(source: str | Path, revision: str | None = None) -> BaseImageProcessor | None:
    """
    The image processor in a folder or a repository of the Hub, at a revision of it; None where there is none.

    Raises:
        ValueError: if it cannot be used.
    """
    try:
        options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if cached_file(source, "preprocessor_config.json", **options):
            return read_processor(source, revision)
    except Exception as error:  # as above
        raise ValueError(f"{source}/preprocessor_config.json cannot be used: {first_line(error)}") from error
    return None


def load_processor(source: str | Path, config: HiViTConfig, revision: str | None = None) -> BaseImageProcessor:
    """
    As `find_processor`; where there is none, the published one of the model's size, and a warning.

    Raises:
        ValueError: if it cannot be used, or there is none and the input is not square.
    """
    found = find_processor(source, revision)
    if found is not None:
        return found
    height, width = (length * config.patch_size for length in config.grid_size)
    if height != width:
        raise ValueError(f"{source} has no preprocessor_config.json, which {height}x{width} px need: write one.")
    logger.warning(
        f"{source} has no preprocessor_config.json: taking ImageNet's mean and std at {height} px. If the model "
        "was trained with others, save its image processor there."
    )
    return evaluation_processor(height)


def pixel_statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """
    Mean and std of each channel that an image processor normalizes values in [0, 1] with; also where it leaves steps
    out or rescales otherwise.
    """
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0  # from [0, 1]
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    mean, std = (list(v) if isinstance(v, (list, tuple)) else [v] * num_channels for v in (mean, std))
    return [value / scale for value in mean], [value / scale for value in std]
