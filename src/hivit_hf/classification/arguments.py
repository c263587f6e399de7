# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of fine-tuning a classifier: labels, augmentation, mixup, the published cosine schedule, LoRA."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..configuration_hivit import PROBLEM_TYPES
from ..training.arguments import DataArguments, HiViTTrainingArguments, ModelArguments
from ..training.command_line import (
    argument,
    ascending_pair,
    decay_rate,
    fraction,
    nonnegative,
    one_of,
    positive,
    side_px,
    within,
)


@dataclass
class ClassificationModelArguments(ModelArguments):
    """Which weights a classifier begins with, and what of it is trained."""

    problem_type: Annotated[str, one_of(*PROBLEM_TYPES)] = argument(
        "single_label_classification", f"Kind of targets: {', '.join(PROBLEM_TYPES)}."
    )
    image_size: Annotated[int | None, positive, side_px] = argument(None, "Side of the images in px (the model's).")
    head_init_std: Annotated[float | None, positive] = argument(
        None, "Standard deviation of a new classifier's weights (the configuration's initializer_range)."
    )
    init_relative_position_bias: bool = argument(
        False, "Initialize new relative position biases at random, as in supervised training from scratch; else zero."
    )
    lora_r: Annotated[int | None, positive] = argument(
        None, "Rank of LoRA on the attention's projections, by PEFT, instead of training all weights."
    )

    FLAGS_OF_THEIR_OWN: ClassVar[tuple[str, ...]] = ("image_size", "drop_path_rate", "problem_type")

    def __post_init__(self):
        super().__post_init__()
        if self.lora_r is not None and self.init_relative_position_bias:
            raise ValueError("--lora_r keeps the weights as they are: leave out --init_relative_position_bias.")


@dataclass
class ClassificationDataArguments(DataArguments):
    """Images with labels, and their augmentation in training (timm's)."""

    image_column_name: str | None = argument(None, "Column of the images, if it cannot be inferred.")
    label_column_name: list[str] = argument(
        [], "Column of the labels, if it cannot be inferred, or several columns, one per label or number."
    )
    crop_scale: Annotated[list[float], ascending_pair("0.08 1.0", high=1)] = argument(
        [0.08, 1.0], "Lower and upper bound of the random crop's area, as fractions of the image."
    )
    auto_augment: str | None = argument(None, "timm's policy of augmentation, such as rand-m9-mstd0.5-inc1 (paper).")
    color_jitter: Annotated[float, nonnegative] = argument(0.0, "Strength of color jitter; none with --auto_augment.")
    rotation_degrees: Annotated[float, within(0, 180)] = argument(
        0.0, "Largest angle, in degrees, by which crops are rotated at random, either way; corners become black."
    )
    random_erasing: Annotated[float, fraction] = argument(0.0, "Probability of erasing a random box.")
    mixup: Annotated[float, nonnegative] = argument(0.0, "Alpha of mixup; 0 for none.")
    cutmix: Annotated[float, nonnegative] = argument(0.0, "Alpha of CutMix; 0 for none.")
    mixup_prob: Annotated[float, fraction] = argument(1.0, "Fraction of the batches that are mixed.")
    mixup_switch_prob: Annotated[float, fraction] = argument(
        0.5, "Fraction of the mixed batches that use CutMix rather than mixup."
    )
    crop_pct: Annotated[float | None, within(0, 1, low_included=False)] = argument(
        None, "Fraction of the shorter side that is evaluated (0.875 up to 224 px, then 1)."
    )


@dataclass
class ClassificationTrainingArguments(HiViTTrainingArguments):
    """`HiViTTrainingArguments` with the published schedule: linear warmup, then a cosine, by epochs."""

    lr_scheduler_type: str = argument("cosine", "Schedule, any of transformers'; cosine is the published one.")
    warmup_epochs: Annotated[float, nonnegative] = argument(2, "Number of warmup epochs, without --warmup_steps.")
    min_learning_rate: Annotated[float, nonnegative] = argument(0.0, "Learning rate at the end of the cosine.")
    warmup_learning_rate: Annotated[float, nonnegative] = argument(0.0, "Learning rate at the start of the warmup.")
    label_smoothing_factor: Annotated[float, decay_rate] = argument(
        0.0, "Fraction of the target that is spread over all classes."
    )
    count_early_layers: bool = argument(
        True, "Give each layer of stages 1 and 2 an id of its own for --layer_decay; else all are 0."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if getattr(self, name) and self.lr_scheduler_type != "cosine":
                raise ValueError(
                    f"{name} is for lr_scheduler_type cosine, but that is {self.lr_scheduler_type.value}: set it to 0."
                )
            if getattr(self, name) > self.learning_rate:
                raise ValueError(f"{name} must not exceed the peak learning rate, {self.learning_rate:.3g}.")
        if not self.warmup_epochs < self.num_train_epochs and self.max_steps <= 0:
            raise ValueError(
                f"warmup_epochs must be less than num_train_epochs {self.num_train_epochs}, got {self.warmup_epochs}."
            )


def check_together(
    model_args: ClassificationModelArguments,
    data_args: ClassificationDataArguments,
    training_args: ClassificationTrainingArguments,
):
    """ValueError for arguments that do not fit each other."""
    if model_args.lora_r is not None and training_args.ema_decay:
        raise ValueError("--lora_r keeps the weights as they are: leave out --ema_decay.")
    mixed = {"mixup": data_args.mixup, "cutmix": data_args.cutmix}
    if model_args.problem_type != "single_label_classification":
        for name, value in (mixed | {"label_smoothing_factor": training_args.label_smoothing_factor}).items():
            if value:
                raise ValueError(f"{name} is for one label per image: leave it out for {model_args.problem_type}.")
    elif len(data_args.label_column_name) > 1:
        raise ValueError(
            f"One label per image is one column, got {', '.join(data_args.label_column_name)}: give one "
            "--label_column_name, or --problem_type multi_label_classification."
        )
    batch_size = training_args.per_device_train_batch_size
    if any(mixed.values()) and batch_size % 2:
        raise ValueError(
            f"mixup and cutmix mix images in pairs, so per_device_train_batch_size must be even, got {batch_size}: use "
            f"{batch_size + 1}, or --mixup 0 --cutmix 0."
        )
