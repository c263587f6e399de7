# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The training of a detector, as numbers."""

import json
from dataclasses import dataclass

from ..training.recipe_old import RUNTIME, TrainerRecipe, argument
from .modeling import DETECTORS


_LEAST_PX = 8  # of a image in the square that is learned from
_MOST_IMAGES = 60  # that a person looks at


@dataclass
class DetectionRecipe(TrainerRecipe):
    """The training of a detector. Every field is a flag of `examples/finetune_detection.py` and a recipe's key."""

    model_name_or_path: str | None = argument(None, "Start from this folder or Hub name of any HiViT or detector.")

    freeze_backbone: bool = argument(False, "Keep the network as it is and learn the norms of its levels and the rest.")
    evaluate_only: bool = argument(False, "Evaluate the detector --model_name_or_path and stop.")
    detector: str = argument("mask_rcnn", f"Find the objects with this detector: {', '.join(DETECTORS)}.")
    head: str = argument(
        "{}", "Change the detector's configuration by this JSON, for example '{\"fpn_channels\": 64}'."
    )

    train_annotations: str | None = argument(None, "Learn from these annotations, a JSON file in COCO's format.")
    train_images: str | None = argument(None, "Find their images in this folder; in that of the file if not given.")
    eval_annotations: str | None = argument(None, "Evaluate with these annotations, of the same categories.")
    eval_images: str | None = argument(None, "Find their images in this folder; in that of the file if not given.")
    bad_annotations: str = argument("refuse", "Choose for annotations that cannot be right: refuse or leave_out.")

    crop_size: int = argument(1024, "Learn from squares of this side in px, which large-scale jitter makes.")
    jitter_scale: list[float] = argument([0.1, 2.0], "Scale from the first to the second of these; 1 fits the square.")
    eval_min_size: int = argument(800, "Resize images to evaluate with to this shorter side in px.")
    eval_max_size: int = argument(1333, "Limit their longest side to this, in px.")

    epochs: float = argument(36, "Train for so many epochs.")
    warmup_steps: int = argument(500, "Reach the highest learning rate after so many steps.")
    decay_epochs: list[float] = argument([27, 33], "Lower the learning rate after these epochs.")
    decay_factor: float = argument(0.1, "Multiply the learning rate by this each time.")
    batch_size: int = argument(2, "Take so many images per process and forward pass.")
    effective_batch_size: int = argument(16, "Accumulate so many images, over all processes, for an optimizer step.")
    eval_batch_size: int = argument(1, "Evaluate so many images per process at once.")
    learning_rate: float = argument(1e-4, "Set the highest learning rate, whatever the number of images per step.")
    num_images: int = argument(4, "Draw what is found on so many images of the evaluation; 0 for none.")
    image_threshold: float = argument(0.5, "Draw what has at least this score.")

    # what other fine-tunings choose and this one does not
    count_early_layers = False  # the dense numbering of layers
    compile = False  # proposals have a new shape in every step

    RUNTIME = RUNTIME | {"eval_batch_size", "num_images", "image_threshold", "evaluate_only"}
    CHOICES = {"detector": DETECTORS, "bad_annotations": ("refuse", "leave_out")}
    POSITIVE = ("crop_size", "eval_min_size", "eval_max_size", "epochs", "eval_batch_size", "decay_factor")
    NONNEGATIVE = ("warmup_steps", "num_images")
    SHARES = ("image_threshold",)
    PUBLISHED_LAYER_DECAY = 0.9

    def __post_init__(self):
        if isinstance(self.head, dict):
            self.head = json.dumps(self.head)
        super().__post_init__()

    def head_changes(self) -> dict:
        """What `head` changes in the detector's configuration. Raises ValueError if it is not JSON."""
        try:
            changes = json.loads(self.head)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--head must be a JSON object such as '{{\"fpn_channels\": 64}}', got {self.head}."
            ) from error
        if not isinstance(changes, dict):
            raise ValueError(f"--head must be a JSON object, got {self.head}.")
        return changes

    @property
    def with_masks(self) -> bool:
        return self.detector == "mask_rcnn"

    def check(self):
        super().check()
        self.head_changes()

    def _check_choices(self):
        for name in ("train_annotations", "eval_annotations"):
            if not getattr(self, name) and not (self.evaluate_only and name == "train_annotations"):
                raise ValueError(
                    f"There is nothing to {name.split('_')[0]} with: give --{name}, a file of COCO's format."
                )
        super()._check_choices()
        if self.evaluate_only and (self.from_scratch or self.resume):
            raise ValueError("--evaluate_only is of a trained detector: give --model_name_or_path, and no --resume.")
        if self.freeze_backbone and self.drop_path_rate:
            raise ValueError("--freeze_backbone leaves nothing to --drop_path_rate: leave one out.")
        own = {"min_size": "eval_min_size", "max_size": "eval_max_size", "predicts_masks": "detector"}
        own |= {"image_mean": "image_mean", "image_std": "image_std", "backbone_config": "model"}
        for name in sorted(set(self.head_changes()) & set(own)):
            raise ValueError(f"--head sets {name}, which has a flag of its own: use --{own[name]}.")

    def _check_ranges(self):
        super()._check_ranges()
        if len(self.jitter_scale) != 2 or not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale must be two positive numbers such as 0.1 2.0, got {self.jitter_scale}.")
        if self.jitter_scale[0] * self.crop_size < _LEAST_PX:
            raise ValueError(
                f"jitter_scale {self.jitter_scale[0]} of {self.crop_size} px leaves less than {_LEAST_PX} px of a "
                "image: begin it higher."
            )
        if self.decay_factor > 1:
            raise ValueError(f"decay_factor must be at most 1, got {self.decay_factor}. Published: 0.1.")
        if self.num_images > _MOST_IMAGES:
            raise ValueError(f"num_images must be at most {_MOST_IMAGES}, got {self.num_images}.")
        if self.eval_min_size > self.eval_max_size:
            raise ValueError(f"eval_min_size {self.eval_min_size} must not exceed eval_max_size {self.eval_max_size}.")
        if sorted(self.decay_epochs) != self.decay_epochs or not all(0 < e < self.epochs for e in self.decay_epochs):
            raise ValueError(
                f"decay_epochs must be ascending and within the {self.epochs} epochs, got {self.decay_epochs}. "
                "Published: 27 33 of 36."
            )
