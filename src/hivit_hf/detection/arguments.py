# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of object detection: detectors, COCO files, large-scale jitter, the published step schedule."""

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

from transformers.trainer_utils import SchedulerType

from ..training.arguments import MAX_BATCH_SIZE, ImageArguments
from ..training.command_line import (
    MAY_CHANGE,
    argument,
    ascending_pair,
    at_most,
    fraction,
    json_object,
    nonnegative,
    one_of,
    positive,
    side_px,
    within,
)
from ..training.dense import DenseModelArguments, DenseTrainingArguments
from .modeling import DETECTORS


_LEAST_PX = 8  # of an image in the training square


@dataclass
class DetectionModelArguments(DenseModelArguments):
    """Which weights a detector begins with, and what of it is trained."""

    model_name_or_path: str | None = argument(None, "Folder or Hub name of any HiViT, or of a detector, to begin with.")
    detector: Annotated[str, one_of(*DETECTORS)] = argument("mask_rcnn", f"Detector: {', '.join(DETECTORS)}.")
    detector_overrides: Annotated[str, json_object] = argument(
        "{}", "Changes of the detector's configuration as JSON, for example '{\"fpn_channels\": 64}'."
    )

    DETECTOR_FLAGS: ClassVar[dict[str, str]] = {  # of keys that --detector_overrides must not set
        "min_size": "eval_min_size",
        "max_size": "eval_max_size",
        "predicts_masks": "detector",
        "image_mean": "image_mean",
        "image_std": "image_std",
        "backbone_config": "config_overrides",
    }

    def __post_init__(self):
        super().__post_init__()
        for name, flag in self.DETECTOR_FLAGS.items():
            if name in self.detector_changes():
                raise ValueError(f"--detector_overrides sets {name}, which has a flag of its own: use --{flag}.")

    def detector_changes(self) -> dict:
        """`detector_overrides` as a dictionary."""
        return json.loads(self.detector_overrides)

    @property
    def with_masks(self) -> bool:
        """Whether the detector predicts masks."""
        return self.detector == "mask_rcnn"


@dataclass
class DetectionDataArguments(ImageArguments):
    """Images with boxes and masks in COCO's format, and their size and augmentation."""

    train_annotations: str | None = argument(None, "Annotations to train on, a JSON file in COCO's format.")
    train_image_dir: str | None = argument(None, "Folder of the training images (that of --train_annotations).")
    eval_annotations: str | None = argument(None, "Annotations to evaluate on, with the same categories.")
    eval_image_dir: str | None = argument(None, "Folder of the validation images (that of --eval_annotations).")
    bad_annotations: Annotated[str, one_of("refuse", "leave_out")] = argument(
        "refuse", "What to do with annotations that cannot be right: refuse or leave_out."
    )
    crop_size: Annotated[int, positive, side_px] = argument(1024, "Side of the square training images in px.")
    jitter_scale: Annotated[list[float], ascending_pair("0.1 2.0")] = argument(
        [0.1, 2.0], "Lower and upper bound of the random scale; at 1 an image fits the square."
    )
    eval_min_size: Annotated[int, positive, side_px] = argument(800, "Shorter side of the images in evaluation, in px.")
    eval_max_size: Annotated[int, positive, side_px] = argument(1333, "Upper bound of their longer side, in px.")

    def __post_init__(self):
        super().__post_init__()
        if not self.eval_annotations:
            raise ValueError("There is nothing to evaluate on: give --eval_annotations, a file in COCO's format.")
        if self.jitter_scale[0] * self.crop_size < _LEAST_PX:
            raise ValueError(
                f"jitter_scale {self.jitter_scale[0]} of {self.crop_size} px leaves less than {_LEAST_PX} px of an "
                "image: raise its lower bound."
            )
        if self.eval_min_size > self.eval_max_size:
            raise ValueError(f"eval_min_size {self.eval_min_size} must not exceed eval_max_size {self.eval_max_size}.")


@dataclass
class DetectionTrainingArguments(DenseTrainingArguments):
    """`DenseTrainingArguments` with the published schedule: linear warmup, then constant but for two steps down."""

    num_train_epochs: Annotated[float, positive] = argument(36, "Number of training epochs.")
    per_device_train_batch_size: Annotated[int, positive] = argument(2, "Training batch size per device.")
    per_device_eval_batch_size: Annotated[int, positive, MAY_CHANGE] = argument(1, "Evaluation batch size per device.")
    effective_batch_size: Annotated[int | None, positive, at_most(MAX_BATCH_SIZE)] = argument(
        16, "Number of images per optimizer step over all devices; --gradient_accumulation_steps follows from it."
    )
    learning_rate: Annotated[float | None, positive] = argument(None, "Peak learning rate, that of the heads (1e-4).")
    lr_scheduler_type: str = argument(
        "constant_with_warmup", "Schedule, any of transformers'; the published one is this one with --decay_epochs."
    )
    warmup_steps: Annotated[float, nonnegative] = argument(500, "Number of warmup steps.")
    decay_epochs: list[float] | None = argument(
        None, "Epochs after which the learning rate is multiplied by --decay_factor (27 33)."
    )
    decay_factor: Annotated[float, within(0, 1, low_included=False)] = argument(
        0.1, "Factor of the learning rate after each of --decay_epochs."
    )
    metric_for_best_model: str | None = argument("box_ap", "Metric for --early_stopping_patience.")
    num_overlays: Annotated[int, within(0, 60), MAY_CHANGE] = argument(
        4, "Number of validation images to draw with detections into detections.png; 0 for none."
    )
    overlay_threshold: Annotated[float, fraction, MAY_CHANGE] = argument(
        0.5, "Lowest score of the detections that are drawn."
    )

    REFUSED: ClassVar[dict[str, str]] = DenseTrainingArguments.REFUSED | dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), "proposals have a new shape in every step"
    )

    def __post_init__(self):
        if self.learning_rate is None and self.base_learning_rate is None:
            self.learning_rate = 1e-4
        super().__post_init__()
        if self.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            if self.decay_epochs:
                raise ValueError(
                    f"The schedule {SchedulerType(self.lr_scheduler_type).value} lowers the learning rate by itself: "
                    "leave out --decay_epochs, or --lr_scheduler_type."
                )
            return
        if self.decay_epochs is None:
            self.decay_epochs = [27, 33]
        last = self.num_train_epochs if self.max_steps <= 0 else float("inf")
        if sorted(self.decay_epochs) != self.decay_epochs or not all(0 < epoch < last for epoch in self.decay_epochs):
            raise ValueError(
                f"decay_epochs must be ascending and within the {self.num_train_epochs} epochs, got "
                f"{self.decay_epochs}. Published: 27 33 of 36."
            )


def check_together(
    model_args: DetectionModelArguments, data_args: DetectionDataArguments, training_args: DetectionTrainingArguments
):
    """ValueError for arguments that do not fit each other."""
    if training_args.do_train and not data_args.train_annotations:
        raise ValueError("There is nothing to train on: give --train_annotations, a file in COCO's format.")
    if not training_args.do_train and model_args.from_scratch:
        raise ValueError("--do_train false evaluates a trained detector: give --model_name_or_path.")
