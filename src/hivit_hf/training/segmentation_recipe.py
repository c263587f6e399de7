# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A training of a segmenter, as numbers."""

import math
from dataclasses import dataclass

from .class_maps import IGNORED
from .recipe import _field
from .trainer_recipe import RUNTIME, DatasetRecipe


@dataclass
class SegmentationRecipe(DatasetRecipe):
    """Every field is a flag of `examples/finetune_segmentation.py` and a recipe's key."""

    model_name_or_path: str | None = _field(None, "Folder or Hub name of any HiViT, or of a segmenter to go on with.")
    freeze_backbone: bool = _field(False, "Learn the heads and the norms of the pyramid only.")
    head_channels: int | None = _field(None, "Width of UPerNet's decoder; the segmenter's or 512 if not given.")
    auxiliary_channels: int | None = _field(None, "Width of the auxiliary head; the segmenter's or 256 if not given.")
    auxiliary_weight: float | None = _field(
        None, "Of the loss of the auxiliary head on stage 3, 0 for no such head; the segmenter's or 0.4 if not given."
    )

    image_column: str = _field("image", "The column with the pictures.")
    map_column: str = _field("annotation", "The column with the class maps: pictures of one channel.")
    reduce_labels: bool = _field(False, "In the maps 0 is not labelled, and classes are counted from 1, as in ADE20K.")

    crop_size: int = _field(640, "Side in px of what is learnt from; a multiple of the patch size.")
    scale_range: list[float] = _field([0.5, 2.0], "Of the shorter side before the crop, relative to --crop_size.")
    max_class_share: float = _field(0.75, "Of a crop's labelled pixels that one class may cover, in ten tries.")
    photometric: bool = _field(True, "Change brightness, contrast, saturation and hue.")

    eval_size: int | None = _field(None, "Shorter side in px of pictures in evaluations; --crop_size if not given.")
    eval_stride: int | None = _field(None, "Slide squares of --crop_size in such steps; else whole pictures.")
    eval_scales: list[float] = _field([1.0], "Look at each picture at these scales, and average.")
    eval_flip: bool = _field(False, "Look at the mirror images too.")
    evaluate_only: bool = _field(False, "Evaluate the segmenter --model_name_or_path and stop.")
    shown_pictures: int = _field(8, "Pictures of the evaluation that overlays.png shows; 0 for none.")

    total_steps: int = _field(80000, "Length of the training and of its schedule.")
    warmup_steps: int = _field(750, "Steps until the schedule is reached.")
    poly_power: float = _field(1.0, "Of what is left of the training, which the learning rate follows.")
    batch_size: int = _field(4, "Pictures per process and forward pass; 2 or more.")
    effective_batch_size: int = _field(32, "Pictures per optimizer step, over all processes; reached by accumulation.")
    learning_rate: float = _field(1e-3, "Highest learning rate, of the heads.")
    evaluate_every_steps: int = _field(8000, "Steps between evaluations and checkpoints.")

    # what other fine-tunings choose and this one does not
    count_stem = False  # the dense numbering of layers
    eval_batch_size = 1  # pictures of any size

    RUNTIME = RUNTIME | {"shown_pictures", "evaluate_only"}
    POSITIVE = ("crop_size", "total_steps", "poly_power")
    OPTIONAL = ("eval_size", "eval_stride", "head_channels", "auxiliary_channels")
    NONNEGATIVE = ("shown_pictures",)
    SHARES = ("max_class_share",)
    PUBLISHED_LAYER_DECAY = 0.75

    def _check_choices(self):
        super()._check_choices()
        if len(self.label_names) < 2:
            raise ValueError(f"Give the names of two classes or more with --label_names, got {self.label_names}.")
        most = IGNORED - self.reduce_labels
        if len(self.label_names) > most:
            raise ValueError(
                f"--label_names has {len(self.label_names)} names, but as {IGNORED} is not labelled in the maps there "
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
            raise ValueError("UPerNet's batch norms cannot learn from one picture: give --batch_size 2 or more.")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(f"warmup_steps must be less than total_steps {self.total_steps}, got {self.warmup_steps}.")
