# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What trainings with `transformers.Trainer` share: where they start, how they learn, where they write."""

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

from ..configuration_hivit import ARCHITECTURES
from .recipe import Recipe, _field


# What may differ between a run and its resumption.
RUNTIME = {"title", "source", "cost", "expected_result", "max_steps", "output_dir", "resume", "keep_last", "tracker"}
RUNTIME |= {"log_every_steps", "num_workers", "check_images", "push_to_hub", "hub_model_id", "hub_private_repo"}
RUNTIME |= {"show_layer_table", "compile", "gradient_checkpointing"}


@dataclass
class TrainerRecipe(Recipe):
    """
    The fields of every training with `Trainer`, and what can be known of them before anything is read. Subclasses add
    their own, and name in `POSITIVE`, `OPTIONAL`, `NONNEGATIVE`, `SHARES` and `FRACTIONS` the ranges of these.
    """

    model_name_or_path: str | None = _field(None, "Start from this folder or Hub name of a HiViT or classifier.")
    from_scratch: bool = _field(False, "Start with random weights of --architecture instead.")
    architecture: str | None = _field(None, f"Train this network and no other: {', '.join(ARCHITECTURES)}.")
    model: str = _field("{}", "Change the configuration by this JSON, for example '{\"window_size\": 14}'.")
    drop_path_rate: float = _field(0.0, "Drop paths of the last layer at this rate (stochastic depth).")

    max_train_samples: int | None = _field(None, "Learn from so many pictures only.")
    max_eval_samples: int | None = _field(None, "Evaluate with so many pictures only.")
    check_images: int = _field(1000, "Decode so many pictures of each split before training, to find bad ones.")
    image_mean: list[float] = _field([], "Subtract these means, in [0, 1]; the model's or ImageNet's if not given.")
    image_std: list[float] = _field([], "Divide by these deviations; the model's or ImageNet's if not given.")
    flip_probability: float = _field(0.5, "Flip pictures horizontally with this probability.")
    num_workers: int = _field(4, "Read and decode in so many processes, for each training process.")

    max_steps: int | None = _field(None, "Stop after so many steps; the schedule stays that of the whole training.")
    batch_size: int = _field(32, "Take so many pictures per process and forward pass.")
    effective_batch_size: int = _field(64, "Accumulate so many pictures, over all processes, for an optimizer step.")
    weight_decay: float = _field(0.05, "Decay matrices this much, but no vectors, position embedding or tables.")
    adam_betas: list[float] = _field([0.9, 0.999], "Set both betas of AdamW.")
    layer_decay: float = _field(1.0, "Multiply the learning rate by this from one layer to the one below.")
    clip_norm: float | None = _field(None, "Limit the norm of the gradient to this; it is unlimited if not given.")
    ema_decay: float | None = _field(None, "Save a moving average of the weights with this decay as the model.")
    early_stopping_patience: int | None = _field(None, "Stop after so many evaluations without a better one.")
    evaluate_every_steps: int | None = _field(None, "Evaluate and save every so many steps, else every epoch.")
    mixed_precision: str = _field("bf16", "Choose the mixed precision: bf16, fp16 (with a gradient scaler) or no.")
    gradient_checkpointing: bool = _field(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = _field(0, "Seed everything random with this number.")

    output_dir: str | None = _field(None, "Write checkpoints, logs, figures, pictures and the model to this folder.")
    resume: str | None = _field(None, "Resume from 'latest', or from the folder of a checkpoint.")
    keep_last: int = _field(2, "Keep so many checkpoints, the best among them.")
    log_every_steps: int = _field(20, "Write a line of the log every so many steps.")
    tracker: str = _field("tensorboard", "Track the run with tensorboard, wandb or none.")
    push_to_hub: bool = _field(False, "Upload the model, its processor and its log at the end.")
    hub_model_id: str | None = _field(None, "Upload to this repository; it is named after the folder if not given.")
    hub_private_repo: bool = _field(False, "Make a new repository private.")
    show_layer_table: bool = _field(False, "Print ids, learning rates and decay of the parameters, and stop.")

    RUNTIME: ClassVar[set[str]] = RUNTIME
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}
    POSITIVE: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # positive, if given
    NONNEGATIVE: ClassVar[tuple[str, ...]] = ()
    SHARES: ClassVar[tuple[str, ...]] = ()  # from 0 to 1
    FRACTIONS: ClassVar[tuple[str, ...]] = ()  # between 0 and 1, if given
    OWN_FLAGS: ClassVar[tuple[str, ...]] = ("drop_path_rate",)  # that --model must not set
    PUBLISHED_LAYER_DECAY: ClassVar[float] = 0.85

    def check(self):
        """
        Everything that can be known before anything is read.

        Raises:
            ValueError: what does not fit, what was given, and what would do.
        """
        self._check_choices()
        self._check_ranges()
        self.model_changes()
        self.accumulation_steps(1)

    def _check_choices(self):
        if not self.output_dir and not self.show_layer_table:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if bool(self.model_name_or_path) == self.from_scratch:
            raise ValueError("Give either --model_name_or_path, or --from_scratch with --architecture.")
        if self.from_scratch and not self.architecture:
            raise ValueError(f"--from_scratch needs --architecture: one of {', '.join(ARCHITECTURES)}.")
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}. Choose from {', '.join(ARCHITECTURES)}.")
        choices = {"mixed_precision": ("bf16", "fp16", "no"), "tracker": ("tensorboard", "wandb", "none")}
        for name, allowed in (choices | self.CHOICES).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in set(self.model_changes()) & set(self.OWN_FLAGS):
            raise ValueError(f"--model sets {name}, which has a flag of its own: use that.")
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo are for --push_to_hub: give it too.")

    def _check_ranges(self):
        positive = ("batch_size", "effective_batch_size", "learning_rate", "keep_last", "log_every_steps")
        optional = ("max_train_samples", "max_eval_samples", "max_steps", "clip_norm", "early_stopping_patience")
        optional += ("evaluate_every_steps", *self.OPTIONAL)
        given = [name for name in optional if getattr(self, name) is not None]
        for name in (*self.POSITIVE, *positive, *given):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("num_workers", "weight_decay", "check_images", *self.NONNEGATIVE):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("flip_probability", *self.SHARES):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        for name in ("ema_decay", *self.FRACTIONS):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay must be in (0, 1], got {self.layer_decay}. Published: {self.PUBLISHED_LAYER_DECAY} for "
                "base."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}. Published: 0.9 0.999.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")

    def identity(self) -> dict:
        """The numbers that a resumption must share with its run."""
        return {name: value for name, value in asdict(self).items() if name not in self.RUNTIME}


@dataclass
class DatasetRecipe(TrainerRecipe):
    """What trainings on datasets of the `datasets` library add: where the samples are."""

    dataset_name: str | None = _field(
        None, "Read a dataset of the Hub, a folder of pictures or Parquet, or a saved dataset."
    )
    dataset_config: str | None = _field(None, "Take this configuration of the Hub dataset.")
    dataset_revision: str | None = _field(None, "Take this commit of the Hub dataset.")
    train_split: str = _field("train", "Learn from this split.")
    eval_split: str | None = _field(None, "Evaluate with this split; 'validation' or 'test' if not given.")
    eval_fraction: float | None = _field(None, "Hold out this share of the training split to evaluate with.")
    label_names: list[str] = _field([], "Name the classes, in the order of their numbers.")
    compile: bool = _field(False, "Compile the network with torch.compile.")

    FRACTIONS: ClassVar[tuple[str, ...]] = ("eval_fraction",)

    def _check_choices(self):
        if not self.dataset_name:
            raise ValueError("There is nothing to learn from: give --dataset_name.")
        super()._check_choices()
        if self.eval_split and self.eval_fraction:
            raise ValueError("Give --eval_split or --eval_fraction, not both.")
