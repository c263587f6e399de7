# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of fine-tuning a classifier."""

from dataclasses import dataclass

from ..configuration_hivit import PROBLEM_TYPES
from ..training.recipe_old import RUNTIME, DatasetRecipe, argument


@dataclass
class FinetuneRecipe(DatasetRecipe):
    """A supervised training. Every field is a flag of `examples/finetune_classification.py` and a recipe's key."""

    problem_type: str = argument("single_label_classification", f"Learn this kind of task: {', '.join(PROBLEM_TYPES)}.")
    image_size: int | None = argument(None, "Take images of this side in px; that of the model is kept if not given.")
    head_init_std: float | None = argument(None, "Draw a new classifier with this deviation; the model's if not given.")
    draw_relative_tables: bool = argument(False, "Draw new relative tables at random; they start at zero otherwise.")
    lora_rank: int | None = argument(None, "Learn changes of the attention of this rank by PEFT, not all weights.")

    image_column: str | None = argument(None, "Find the images in this column, if it cannot be told.")
    label_column: list[str] = argument(
        [], "Find labels in this column, if it cannot be told, or one in each of several."
    )

    crop_scale: list[float] = argument([0.08, 1.0], "Crop from the first to the second of these shares of a image.")
    auto_augment: str | None = argument(None, "Apply this policy of timm, such as rand-m9-mstd0.5-inc1 of the paper.")
    color_jitter: float = argument(0.0, "Jitter colors with this strength; a policy replaces it, as in timm.")
    random_erasing: float = argument(0.0, "Fill a random box with noise with this probability.")
    mixup: float = argument(0.0, "Blend images in pairs with this alpha of mixup; 0 for none.")
    cutmix: float = argument(0.0, "Cut boxes of images into others with this alpha of cutmix; 0 for none.")
    mixup_probability: float = argument(1.0, "Mix this share of the batches.")
    mixup_switch_probability: float = argument(0.5, "Cut rather than blend this share of the mixed batches.")
    label_smoothing: float = argument(0.0, "Spread this share of the target over all classes.")
    crop_pct: float | None = argument(None, "Evaluate with this share of the shorter side; 0.875 up to 224 px, then 1.")

    epochs: float = argument(20, "Train for so many epochs.")
    warmup_epochs: float = argument(2, "Reach the highest learning rate after so many epochs.")
    eval_batch_size: int = argument(64, "Evaluate so many images per process at once.")
    base_learning_rate: float = argument(5e-4, "Reach this learning rate for 256 images per step; it grows with them.")
    min_learning_rate: float = argument(0.0, "End the cosine at this learning rate.")
    warmup_learning_rate: float = argument(0.0, "Begin the warm-up with this learning rate.")
    count_early_layers: bool = argument(True, "Count each layer of stages 1 and 2 for the decay; else all are layer 0.")

    evaluate_only = False  # examples/evaluate_classification.py does that

    RUNTIME = RUNTIME | {"eval_batch_size"}
    CHOICES = {"problem_type": tuple(PROBLEM_TYPES)}
    POSITIVE = ("epochs", "eval_batch_size", "base_learning_rate")
    OPTIONAL = ("image_size", "head_init_std", "lora_rank")
    NONNEGATIVE = ("min_learning_rate", "warmup_learning_rate", "mixup", "cutmix", "color_jitter")
    SHARES = ("random_erasing", "mixup_probability", "mixup_switch_probability")
    OWN_FLAGS = ("image_size", "drop_path_rate", "problem_type")

    def _check_choices(self):
        super()._check_choices()
        if self.lora_rank is not None and (self.draw_relative_tables or self.ema_decay):
            raise ValueError(
                "--lora_rank keeps the weights as they are: leave out --draw_relative_tables, --ema_decay."
            )

    def _check_ranges(self):
        super()._check_ranges()
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}. Published: 0.875.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two shares such as 0.08 1.0, got {self.crop_scale}.")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(f"{name} must not exceed the highest rate, {self.learning_rate:.3g}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs {self.epochs}, got {self.warmup_epochs}.")
        self._check_targets()

    def _check_targets(self):
        if self.problem_type != "single_label_classification":
            for name in ("mixup", "cutmix", "label_smoothing"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for one label per image: leave it out for {self.problem_type}.")
        elif len(self.label_column) > 1:
            raise ValueError(
                f"One label per image is one column, got {', '.join(self.label_column)}: give one --label_column, "
                "or --problem_type multi_label_classification."
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix images in pairs, so batch_size must be even, got {self.batch_size}: "
                f"use {self.batch_size + 1}, or --mixup 0 --cutmix 0."
            )
