# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of semantic segmentation: UPerNet's heads, crops, sliding windows, the published schedule."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from transformers.trainer_utils import SchedulerType

from ..training.arguments import MAX_BATCH_SIZE, DataArguments
from ..training.command_line import (
    MAY_CHANGE,
    all_positive,
    argument,
    ascending_pair,
    at_most,
    fraction,
    nonnegative,
    positive,
    side_px,
)
from ..training.dense import DenseModelArguments, DenseTrainingArguments
from .metrics import IGNORE_INDEX


@dataclass
class SegmentationModelArguments(DenseModelArguments):
    """Which weights a segmentation model begins with, its heads, and what of it is trained."""

    model_name_or_path: str | None = argument(
        None, "Folder or Hub name of any HiViT, or of a segmentation model, to begin with."
    )
    head_channels: Annotated[int | None, positive] = argument(None, "Width of UPerNet's decoder (the model's, or 512).")
    auxiliary_channels: Annotated[int | None, positive] = argument(
        None, "Width of the auxiliary head (the model's, or 256)."
    )
    auxiliary_weight: Annotated[float | None, nonnegative] = argument(
        None, "Weight of the auxiliary head's loss, on stage 3; 0 for no such head (the model's, or 0.4)."
    )

    def __post_init__(self):
        super().__post_init__()
        if "image_size" in self.overrides():
            raise ValueError("--config_overrides sets image_size, which follows from --crop_size: use that.")

    def heads(self) -> dict[str, int | float]:
        """What is given of the heads."""
        names = ("head_channels", "auxiliary_channels", "auxiliary_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class SegmentationDataArguments(DataArguments):
    """Images with segmentation maps, random crops of them in training, and how whole images are evaluated."""

    image_column_name: str = argument("image", "Column of the images.")
    label_column_name: str = argument("annotation", "Column of the segmentation maps, images of one channel.")
    do_reduce_labels: bool = argument(
        False, "Read 0 in segmentation maps as not labeled, and count classes from 1, as in ADE20K."
    )
    crop_size: Annotated[int, positive, side_px] = argument(
        640, "Side of the square training crops in px, a multiple of the patch size."
    )
    scale_range: Annotated[list[float], ascending_pair("0.5 2.0")] = argument(
        [0.5, 2.0], "Lower and upper bound of the random scale: shorter side of the image / --crop_size."
    )
    max_class_fraction: Annotated[float, fraction] = argument(
        0.75, "Largest fraction of a crop's labeled pixels in one class; ten crops are tried at most."
    )
    photometric: bool = argument(True, "Distort brightness, contrast, saturation and hue.")

    eval_size: Annotated[int | None, positive, side_px] = argument(
        None, "Shorter side of the images in evaluation, in px (--crop_size)."
    )
    eval_stride: Annotated[int | None, positive, side_px] = argument(
        None, "Stride in px of sliding windows of --crop_size in evaluation, instead of whole images."
    )
    eval_scales: Annotated[list[float], all_positive] = argument([1.0], "Scales of each image to average over.")
    eval_flip: bool = argument(False, "Average over the mirror images too.")

    def __post_init__(self):
        super().__post_init__()
        most, names = IGNORE_INDEX - self.do_reduce_labels, self.class_names
        if len(names) < 2:
            raise ValueError(f"Give the names of two classes or more with --class_names, got {names}.")
        if len(names) > most:
            raise ValueError(
                f"--class_names has {len(names)} names, but as {IGNORE_INDEX} is not labeled in segmentation maps, "
                f"there can be {most}{' with --do_reduce_labels' if self.do_reduce_labels else ''}: join rare classes."
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"--class_names must differ, but {', '.join(twice)} is there more than once.")
        if not self.eval_scales:
            raise ValueError("eval_scales must be one or more positive numbers such as 0.5 1.0 1.5.")
        if self.eval_stride is not None and self.eval_stride > self.crop_size:
            raise ValueError(
                f"eval_stride {self.eval_stride} leaves gaps between windows of {self.crop_size} px: make it smaller."
            )


@dataclass
class SegmentationTrainingArguments(DenseTrainingArguments):
    """`DenseTrainingArguments` with the published schedule: a polynomial of the remaining steps, from the first on."""

    per_device_train_batch_size: Annotated[int, positive] = argument(4, "Training batch size per device, 2 or more.")
    per_device_eval_batch_size: Annotated[int, positive, MAY_CHANGE] = argument(1, "Refused.")
    effective_batch_size: Annotated[int | None, positive, at_most(MAX_BATCH_SIZE)] = argument(
        32, "Number of images per optimizer step over all devices; --gradient_accumulation_steps follows from it."
    )
    max_steps: int | None = argument(None, "Number of optimizer steps (80000, unless --num_train_epochs is given).")
    num_train_epochs: Annotated[float | None, positive] = argument(
        None, "Number of training epochs, instead of --max_steps."
    )
    learning_rate: Annotated[float | None, positive] = argument(None, "Peak learning rate, that of the heads (1e-3).")
    lr_scheduler_type: str = argument("polynomial", "Schedule, any of transformers'; polynomial is the published one.")
    warmup_steps: Annotated[float, nonnegative] = argument(750, "Number of warmup steps.")
    poly_power: Annotated[float, positive] = argument(1.0, "Power of the polynomial schedule.")
    eval_strategy: str = argument("steps", "When to evaluate: no, steps or epoch.")
    eval_steps: Annotated[float | None, positive] = argument(None, "Number of steps between evaluations (8000).")
    save_strategy: str = argument("steps", "When to save: no, steps, epoch or best.")
    save_steps: Annotated[float | None, positive] = argument(None, "Number of steps between checkpoints (eval_steps).")
    metric_for_best_model: str | None = argument("mean_iou", "Metric for --early_stopping_patience.")
    num_overlays: Annotated[int, nonnegative, MAY_CHANGE] = argument(
        8, "Number of validation images to draw with their predictions into overlays.png; 0 for none."
    )

    REFUSED: ClassVar[dict[str, str]] = DenseTrainingArguments.REFUSED | {
        "per_device_eval_batch_size": "images of many sizes are evaluated one by one"
    }

    def __post_init__(self):
        if self.per_device_train_batch_size == 1:
            raise ValueError(
                "UPerNet's batch norms cannot be trained on one image: give --per_device_train_batch_size 2 or more."
            )
        if self.max_steps in (None, -1):
            self.max_steps = 80_000 if self.num_train_epochs is None else -1
        elif self.max_steps < 1:
            raise ValueError(f"max_steps must be a positive number, got {self.max_steps}.")
        elif self.num_train_epochs is not None:
            raise ValueError("Give --max_steps or --num_train_epochs, not both.")
        self.num_train_epochs = self.num_train_epochs or 1.0  # which has no meaning beside max_steps
        if self.learning_rate is None and self.base_learning_rate is None:
            self.learning_rate = 1e-3
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = 8000
        if self.save_steps is None:
            self.save_steps = (self.eval_steps or 8000) if self.save_strategy == "steps" else 500  # which says nothing
        super().__post_init__()
        if 0 < self.max_steps <= self.warmup_steps:
            raise ValueError(f"warmup_steps must be less than max_steps {self.max_steps}, got {self.warmup_steps}.")
        if self.lr_scheduler_type == SchedulerType.POLYNOMIAL and self.lr_scheduler_kwargs:
            raise ValueError("The polynomial schedule has a flag, --poly_power: leave out --lr_scheduler_kwargs.")


def check_together(model_args: SegmentationModelArguments, training_args: SegmentationTrainingArguments):
    """ValueError for arguments that do not fit each other."""
    if not training_args.do_train and model_args.from_scratch:
        raise ValueError("--do_train false evaluates a trained segmentation model: give --model_name_or_path.")
