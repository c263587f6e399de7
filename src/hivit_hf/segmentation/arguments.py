# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A training of a segmenter, as numbers."""

import math
from dataclasses import dataclass

from ..training.recipe_old import RUNTIME, DatasetRecipe, argument
from .data import IGNORED


@dataclass
class SegmentationRecipe(DatasetRecipe):
    """Every field is a flag of `examples/finetune_segmentation.py` and a recipe's key."""

    model_name_or_path: str | None = argument(
        None, "Begin with this folder or Hub name of any HiViT, or of a segmenter."
    )
    freeze_backbone: bool = argument(False, "Learn the heads and the norms of the pyramid only.")
    head_channels: int | None = argument(None, "Make UPerNet's decoder so wide (the segmenter's, or 512).")
    auxiliary_channels: int | None = argument(None, "Make the auxiliary head so wide (the segmenter's, or 256).")
    auxiliary_weight: float | None = argument(
        None,
        "Multiply the loss of the auxiliary head on stage 3 by this; 0 for no such head (the segmenter's, or 0.4).",
    )

    image_column: str = argument("image", "Take images from this column.")
    map_column: str = argument("annotation", "Take class maps, images of one channel, from this column.")
    reduce_labels: bool = argument(False, "Read 0 in maps as not labeled, and count classes from 1, as in ADE20K.")

    crop_size: int = argument(640, "Learn from squares with this side in px, a multiple of the patch size.")
    scale_range: list[float] = argument(
        [0.5, 2.0], "Scale the shorter side to between these times --crop_size before the crop."
    )
    max_class_share: float = argument(
        0.75, "Draw the crop anew, ten times at most, where one class covers a larger share of labeled pixels."
    )
    photometric: bool = argument(True, "Change brightness, contrast, saturation and hue.")

    eval_size: int | None = argument(
        None, "Resize the shorter side of images to so many px in evaluations (--crop_size)."
    )
    eval_stride: int | None = argument(
        None, "Evaluate squares of --crop_size that slide in steps of so many px, not whole images."
    )
    eval_scales: list[float] = argument([1.0], "Look at each image at these scales, and average.")
    eval_flip: bool = argument(False, "Look at the mirror images too.")
    evaluate_only: bool = argument(False, "Evaluate the segmenter --model_name_or_path and stop.")
    shown_images: int = argument(8, "Draw so many images of the evaluation into overlays.png; 0 for none.")

    total_steps: int = argument(80000, "Train for so many steps, which the schedule spans.")
    warmup_steps: int = argument(750, "Reach the schedule after so many steps.")
    poly_power: float = argument(1.0, "Lower the learning rate as the remaining share of the training to this power.")
    batch_size: int = argument(4, "Take so many images per process and forward pass, 2 or more.")
    effective_batch_size: int = argument(
        32, "Reach so many images per optimizer step, over all processes, by accumulation."
    )
    learning_rate: float = argument(1e-3, "Set the highest learning rate, that of the heads.")
    evaluate_every_steps: int = argument(8000, "Evaluate and save every so many steps.")

    # what other fine-tunings choose and this one does not
    count_stem = False  # the dense numbering of layers
    eval_batch_size = 1  # images of any size

    RUNTIME = RUNTIME | {"shown_images", "evaluate_only"}
    POSITIVE = ("crop_size", "total_steps", "poly_power")
    OPTIONAL = ("eval_size", "eval_stride", "head_channels", "auxiliary_channels")
    NONNEGATIVE = ("shown_images",)
    SHARES = ("max_class_share",)
    PUBLISHED_LAYER_DECAY = 0.75

    def _check_choices(self):
        super()._check_choices()
        if len(self.label_names) < 2:
            raise ValueError(f"Give the names of two classes or more with --label_names, got {self.label_names}.")
        most = IGNORED - self.reduce_labels
        if len(self.label_names) > most:
            raise ValueError(
                f"--label_names has {len(self.label_names)} names, but as {IGNORED} is not labeled in the maps there "
                f"can be {most}{' with --reduce_labels' if self.reduce_labels else ''}: join rare classes."
            )
        if len(set(self.label_names)) < len(self.label_names):
            twice = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
            raise ValueError(f"--label_names must differ, but {', '.join(twice)} is there more than once.")
        if "image_size" in self.model_changes():
            raise ValueError("--model sets image_size, which follows from --crop_size: use that.")
        if self.freeze_backbone and self.drop_path_rate:
            raise ValueError(
                f"--drop_path_rate {self.drop_path_rate} is for a backbone that learns: set it to 0, or leave out "
                "--freeze_backbone."
            )
        if self.evaluate_only and (self.from_scratch or self.resume):
            raise ValueError("--evaluate_only is of a trained segmenter: give --model_name_or_path, and no --resume.")
        if self.evaluate_only and self.push_to_hub:
            raise ValueError("--evaluate_only makes no model to upload: leave out --push_to_hub.")

    def _check_ranges(self):
        super()._check_ranges()
        if self.auxiliary_weight is not None and not 0 <= self.auxiliary_weight < math.inf:
            raise ValueError(f"auxiliary_weight must not be negative, got {self.auxiliary_weight}.")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be two numbers such as 0.5 2.0, got {self.scale_range}.")
        if not self.eval_scales or not all(scale > 0 for scale in self.eval_scales):
            raise ValueError(f"eval_scales must be positive numbers such as 0.5 1.0 1.5, got {self.eval_scales}.")
        if self.eval_stride is not None and self.eval_stride > self.crop_size:
            raise ValueError(
                f"eval_stride {self.eval_stride} leaves gaps between squares of {self.crop_size} px: make it smaller."
            )
        if self.batch_size < 2:
            raise ValueError("UPerNet's batch norms cannot learn from one image: give --batch_size 2 or more.")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"warmup_steps must be less than total_steps {self.total_steps}, got {self.warmup_steps}.")
