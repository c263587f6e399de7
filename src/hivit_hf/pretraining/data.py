# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Data of pre-training: the stream of training images, and the validation images."""

import math
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..configuration_hivit import HiViTConfig
from ..data.streaming import SampleStream, check_disjoint, check_shards, open_source, read_some
from ..data.transforms import CenterCrop, RandomCrop, normalize
from ..image_processing import evaluation_resize
from .arguments import PretrainingArguments, PretrainingDataArguments
from .checkpoint import Resumption


@dataclass(frozen=True)
class ValidationImages:
    """
    The images of the evaluations during training, always the same.

    Args:
        images: (number, num_channels, image_size, image_size), uint8.
        labels: class numbers (number,), if there are any.
        name: of the dataset.
        revision: of the dataset, as in `OpenSource`.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    name: str
    revision: str | None


def open_stream(
    data_args: PretrainingDataArguments,
    training_args: PretrainingArguments,
    config: HiViTConfig,
    accelerator: Accelerator,
    resumed: Resumption | None = None,
) -> SampleStream:
    """
    The training images of this rank. A resumption reads the commits of Hub datasets that its run began with.

    Raises:
        ValueError: for data that cannot be read, or with fewer shards than data loading workers.
    """
    sources = data_args.train_sources()
    if resumed is not None:
        sources = [replace(source, revision=commit) for source, commit in zip(sources, resumed.manifest["revisions"])]
    opened = [open_source(source) for source in sources]
    check_shards(opened, accelerator.num_processes, training_args.dataloader_num_workers)
    crop = RandomCrop(
        config.image_size, tuple(data_args.crop_scale), data_args.flip_probability, num_channels=config.num_channels
    )
    stream = SampleStream(
        opened,
        crop,
        math.prod(config.grid_size),
        training_args.seed,
        accelerator.process_index,
        accelerator.num_processes,
        data_args.shuffle_window,
        data_args.max_bad_fraction,
    )
    if accelerator.num_processes > 1:
        check_disjoint(stream, gather_object)
    return stream


def read_validation_images(
    data_args: PretrainingDataArguments, config: HiViTConfig, stream: SampleStream, resumed: Resumption | None = None
) -> ValidationImages:
    """
    Validation images, or training images if no dataset of validation images is given.

    Raises:
        ValueError: for data that cannot be read, or a single image with a label.
    """
    source = data_args.eval_source()
    if source is not None and resumed is not None and source.name == resumed.manifest["validation"][0]:
        source = replace(source, revision=resumed.manifest["validation"][1])
    opened = stream.sources[0].opened if source is None else open_source(source)
    crop = CenterCrop(config.image_size, evaluation_resize(config.image_size), config.num_channels)
    images, labels = read_some(opened, crop, data_args.max_eval_samples)
    if labels is not None and len(labels) < 2:
        raise ValueError(f"kNN accuracy takes two labeled images or more, got {len(labels)}: raise --max_eval_samples.")
    return ValidationImages(images, labels, opened.source.name, opened.revision)


def to_device(batch: dict, device: torch.device, data_args: PretrainingDataArguments) -> dict[str, torch.Tensor]:
    """The arguments of the model in a batch of a stream, with normalized pixels, on a device."""
    pixels = batch["pixel_values"].to(device, non_blocking=True)
    pixels = normalize(pixels, tuple(data_args.image_mean), tuple(data_args.image_std))
    return {"pixel_values": pixels, "noise": batch["noise"].to(device, non_blocking=True)}
