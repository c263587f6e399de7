# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training and validation data of classifiers: labels as targets, augmented images, mixed batches."""

from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import BitImageProcessor

from ..configuration_hivit import HiViTConfig
from ..data.datasets import ImageDataset, check_images, image_column, sample_rows
from ..data.labels import LabelEncoding, check_same_labels, find_labels
from ..data.transforms import ClassificationCollator, EvaluationTransform, training_transform
from ..image_processing import evaluation_processor
from ..training.initialization import Initialization
from .arguments import ClassificationDataArguments, ClassificationTrainingArguments


def read_labels(
    splits: Sequence[Dataset], data_args: ClassificationDataArguments, problem_type: str
) -> tuple[LabelEncoding, list[torch.Tensor]]:
    """
    The labels of the training split, and the targets of both splits.

    Raises:
        ValueError: for labels that cannot be found or read, or differ between the splits.
    """
    labels = find_labels(splits[0], problem_type, data_args.label_column_name, data_args.class_names)
    targets = [labels.targets(split, name) for split, name in zip(splits, ("train", "eval"))]
    check_same_labels(*splits, labels, targets)
    return labels, targets


def make_processor(
    initialization: Initialization, config: HiViTConfig, data_args: ClassificationDataArguments
) -> BitImageProcessor:
    """
    The image processor of evaluations, which is saved with the model.

    Raises:
        ValueError: for images that are not square, numbers of channels that images do not have, and statistics of
            another number of channels.
    """
    if not isinstance(config.image_size, int):
        raise ValueError(f"The network takes {config.image_size} px: give one --image_size for square images.")
    if config.num_channels not in (1, 3, 4):
        raise ValueError(f"The network takes {config.num_channels} channels, but images have 1, 3 or 4.")
    mean, std = initialization.statistics(data_args, config.num_channels)
    return evaluation_processor(config.image_size, mean, std, data_args.crop_pct)


def make_datasets(
    splits: Sequence[Dataset],
    targets: Sequence[torch.Tensor],
    config: HiViTConfig,
    processor: BitImageProcessor,
    data_args: ClassificationDataArguments,
    seed: int,
) -> tuple[ImageDataset, ImageDataset]:
    """
    Items for training and validation: `pixel_values` (channels, H, W) and `labels`.

    Raises:
        ValueError: for a column that holds no images, and for images that cannot be read.
    """
    column = image_column(splits[0], data_args.image_column_name)
    image_column(splits[1], column, "eval")
    augmentation = training_transform(
        config.image_size,
        processor.image_mean,
        processor.image_std,
        data_args.crop_scale,
        data_args.flip_probability,
        data_args.auto_augment,
        data_args.color_jitter,
        data_args.random_erasing,
        data_args.rotation_degrees,
    )
    limits = (data_args.max_train_samples, data_args.max_eval_samples)
    rows = [sample_rows(len(split), limit, seed) for split, limit in zip(splits, limits)]
    train, validation = (split.select(row) for split, row in zip(splits, rows))
    targets = [target[torch.tensor(row)] for target, row in zip(targets, rows)]
    channels = config.num_channels
    made = (
        ImageDataset(train, column, augmentation, targets[0], channels, seed, "train"),
        ImageDataset(validation, column, EvaluationTransform(processor), targets[1], channels, name="eval"),
    )
    for images in made:
        check_images(images, data_args.check_images)
    return made


def make_collator(
    labels: LabelEncoding, data_args: ClassificationDataArguments, training_args: ClassificationTrainingArguments
) -> ClassificationCollator:
    """ClassificationCollator of items, with mixup, CutMix and label smoothing in training."""
    return ClassificationCollator(
        len(labels.names),
        data_args.mixup,
        data_args.cutmix,
        data_args.mixup_prob,
        data_args.mixup_switch_prob,
        training_args.label_smoothing_factor,
    )
