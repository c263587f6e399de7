# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of masked pre-training."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ..configuration_hivit import ARCHITECTURES, HiViTConfig
from ..data.streaming import Source
from ..training.recipe_old import Recipe, argument


# What may differ between a run and its resumption: what the recipe says of itself, and where and how often it writes.
RUNTIME = {"title", "source", "cost", "expected_result", "max_steps", "output_dir", "resume", "checkpoint_every_steps"}
RUNTIME |= {"keep_last", "keep_every_steps", "log_every_steps", "log_samples", "tracker", "monitor_every_steps"}
RUNTIME |= {"eval_dataset_name", "eval_split", "label_column", "monitor_images", "hub_model_id", "hub_private"}
RUNTIME |= {"eval_config", "eval_image_column", "allow_topology_change", "allow_recipe_change", "max_bad_fraction"}
TOPOLOGY = {"num_workers", "batch_size"}  # may differ if that is asked for


@dataclass
class PretrainRecipe(Recipe):
    """A masked pre-training. Every field is a flag of `examples/pretrain_mim.py` and a key of a recipe file."""

    architecture: str = argument("base-mae", f"Train this network: {', '.join(ARCHITECTURES)}.")
    model: str = argument("{}", "Change the configuration by this JSON, for example '{\"patch_size\": 8}'.")
    image_size: int = argument(224, "Train with images of this side in px.")
    mask_ratio: float = argument(0.75, "Hide this share of the units.")
    drop_path_rate: float = argument(0.0, "Drop paths of the last layer at this rate (stochastic depth).")

    dataset_name: list[str] = argument([], "Read datasets of the Hub, or folders of Parquet files, tars or images.")
    dataset_weights: list[float] = argument([], "Read each of them this often; all are read alike if not given.")
    dataset_config: str | None = argument(None, "Take this configuration of the Hub datasets.")
    dataset_split: str = argument("train", "Read this split of Hub datasets, or sub-folder of folders that have some.")
    dataset_revision: str | None = argument(None, "Take this commit of the Hub datasets.")
    image_column: str | None = argument(None, "Find the images in this column, if it cannot be told.")
    images_per_epoch: int | None = argument(None, "Count so many images as an epoch; a stream knows no length.")
    crop_scale: list[float] = argument([0.2, 1.0], "Crop from the first to the second of these shares of a image.")
    image_mean: list[float] = argument([0.485, 0.456, 0.406], "Subtract these means of the channels, in [0, 1].")
    image_std: list[float] = argument([0.229, 0.224, 0.225], "Divide by these standard deviations of the channels.")
    flip_probability: float = argument(0.5, "Flip images horizontally with this probability.")
    shuffle_window: int = argument(256, "Shuffle so many images among each other; each worker holds them in memory.")
    max_bad_fraction: float = argument(0.01, "Skip images that cannot be read, up to this share.")
    num_workers: int = argument(4, "Read and decode in so many processes, for each training process.")

    eval_dataset_name: str | None = argument(None, "Look at this dataset's held-out images; else at training ones.")
    eval_split: str = argument("validation", "Look at this split of a Hub dataset, or sub-folder of a folder.")
    eval_config: str | None = argument(None, "Take this configuration of that Hub dataset.")
    eval_image_column: str | None = argument(None, "Find its images in this column, if it cannot be told.")
    label_column: str | None = argument(None, "Probe held-out images by nearest neighbors with this column of labels.")
    monitor_images: int = argument(256, "Look at so many held-out images.")
    monitor_every_steps: int = argument(1000, "Look at them every so many steps.")

    epochs: float = argument(1600, "Train for so many epochs.")
    warmup_epochs: float = argument(40, "Reach the highest learning rate after so many epochs.")
    max_steps: int | None = argument(None, "Stop after so many steps; the schedule stays that of all epochs.")
    batch_size: int = argument(64, "Take so many images per process and forward pass.")
    effective_batch_size: int = argument(4096, "Accumulate so many images, over all processes, for an optimizer step.")
    base_learning_rate: float = argument(1e-4, "Reach this learning rate for 256 images per step; it grows with them.")
    min_learning_rate: float = argument(0.0, "End the cosine at this learning rate.")
    weight_decay: float = argument(0.05, "Decay matrices this much; vectors are not decayed.")
    adam_betas: list[float] = argument([0.9, 0.95], "Set both betas of AdamW.")
    clip_norm: float | None = argument(None, "Limit the norm of the gradient to this; it is unlimited if not given.")
    ema_decay: float | None = argument(None, "Keep a moving average of the weights with this decay, if given.")
    mixed_precision: str = argument("bf16", "Choose the mixed precision: bf16, fp16 (with a gradient scaler) or no.")
    compile: bool = argument(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = argument(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = argument(0, "Seed everything random with this number.")

    output_dir: str | None = argument(None, "Write checkpoints, logs, images and the model to this folder.")
    resume: str | None = argument(None, "Resume from 'latest', or from the folder of a checkpoint.")
    allow_topology_change: bool = argument(
        False, "Resume with other processes, workers or batch_size; shards that were not finished are read again."
    )
    allow_recipe_change: bool = argument(
        False, "Resume with another learning rate, warm-up, decay, clipping or precision, after a run has diverged."
    )
    checkpoint_every_steps: int = argument(1000, "Write a checkpoint every so many steps.")
    keep_last: int = argument(2, "Keep so many of the newest checkpoints.")
    keep_every_steps: int = argument(0, "Keep checkpoints of multiples of so many steps for good; 0 for none.")
    log_every_steps: int = argument(20, "Write a line of the log and the trackers every so many steps.")
    log_samples: bool = argument(False, "Write what each process read, step by step, to samples_rank*.jsonl.")
    tracker: str = argument("tensorboard", "Track the run with tensorboard, wandb or none.")
    hub_model_id: str | None = argument(None, "Upload checkpoints to this repository of the Hub, in the background.")
    hub_private: bool = argument(True, "Make that repository private, if it has to be made.")

    def check(self):
        """
        Everything that can be known before anything is read.

        Raises:
            ValueError: what does not fit, what was given, and what would do.
        """
        if not self.dataset_name:
            raise ValueError("There is nothing to read: give --dataset_name.")
        if not self.output_dir:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset_name):
            raise ValueError(f"{len(self.dataset_name)} datasets need as many weights, got {self.dataset_weights}.")
        if any(not weight > 0 for weight in self.dataset_weights):
            raise ValueError(f"dataset_weights must be positive, got {self.dataset_weights}.")
        if self.mixed_precision not in ("bf16", "fp16", "no"):
            raise ValueError(f"mixed_precision must be bf16, fp16 or no, got {self.mixed_precision!r}.")
        if self.tracker not in ("tensorboard", "wandb", "none"):
            raise ValueError(f"tracker must be tensorboard, wandb or none, got {self.tracker!r}.")
        positive = ["epochs", "batch_size", "effective_batch_size", "base_learning_rate", "shuffle_window"]
        positive += ["checkpoint_every_steps", "keep_last", "log_every_steps", "monitor_every_steps", "monitor_images"]
        positive += [name for name in ("max_steps", "images_per_epoch", "clip_norm") if getattr(self, name) is not None]
        for name in positive:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("num_workers", "keep_every_steps", "weight_decay", "min_learning_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("flip_probability", "max_bad_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}. Published: 0.9 0.95.")
        if not all(value > 0 and math.isfinite(value) for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")
        if not all(math.isfinite(value) for value in self.image_mean):
            raise ValueError(f"image_mean must be numbers, got {self.image_mean}.")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate must not exceed the highest rate, {self.learning_rate:.3g}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}. Try 0.9999.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs {self.epochs}, got {self.warmup_epochs}.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two shares such as 0.2 1.0, got {self.crop_scale}.")
        if self.images_per_epoch is None:
            raise ValueError("A stream does not know its length: give --images_per_epoch (ImageNet-1k: 1281167).")
        if self.label_column and not self.eval_dataset_name:
            raise ValueError("label_column is of the held-out images: give --eval_dataset_name as well.")
        for name in ("dataset_config", "dataset_revision"):
            if getattr(self, name) is not None and all(Path(folder).is_dir() for folder in self.dataset_name):
                raise ValueError(f"{name} is of datasets of the Hub, but {', '.join(self.dataset_name)} are folders.")
        for name in ("allow_topology_change", "allow_recipe_change"):
            if getattr(self, name) and not self.resume:
                raise ValueError(f"{name} is about resumptions: give --resume as well.")
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"keep_every_steps {self.keep_every_steps} must be a multiple of checkpoint_every_steps "
                f"{self.checkpoint_every_steps}, as only those exist."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}.")
        config = self.model_config()
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != config.num_channels:
                raise ValueError(f"{name} needs {config.num_channels} numbers, got {getattr(self, name)}.")
        config.num_visible_units(math.prod(config.grid_size))

    def model_config(self) -> HiViTConfig:
        """The network. Raises ValueError if its numbers do not fit."""
        changes = self.model_changes()
        own = {"image_size": self.image_size, "mask_ratio": self.mask_ratio, "drop_path_rate": self.drop_path_rate}
        twice = sorted(set(changes) & set(own))
        if twice:
            raise ValueError(f"--model sets {', '.join(twice)}, which have flags of their own: use those.")
        relative = {} if "use_relative_position_bias" in changes else {"use_relative_position_bias": False}
        return HiViTConfig.from_architecture(self.architecture, **relative, **changes, **own)

    def sources(self) -> list[Source]:
        """What is read."""
        weights = self.dataset_weights or [1.0] * len(self.dataset_name)
        where = (self.dataset_config, self.dataset_split, self.dataset_revision, self.image_column)
        return [Source(name, *where, weight) for name, weight in zip(self.dataset_name, weights)]

    def held_out(self) -> Source | None:
        """What is looked at now and then."""
        if self.eval_dataset_name is None:
            return None
        config, column, revision = self.eval_config, self.eval_image_column, None
        if self.eval_dataset_name in self.dataset_name:
            config, column, revision = config or self.dataset_config, column or self.image_column, self.dataset_revision
        return Source(self.eval_dataset_name, config, self.eval_split, revision, column, label_column=self.label_column)

    @property
    def steps_per_epoch(self) -> float:
        return self.images_per_epoch / self.effective_batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return max(1, round(self.epochs * self.steps_per_epoch))

    @property
    def warmup_steps(self) -> float:
        return min(self.warmup_epochs * self.steps_per_epoch, self.total_steps - 1)

    def identity(self) -> dict:
        """The numbers that a resumption must share with its run."""
        return {name: value for name, value in asdict(self).items() if name not in RUNTIME | TOPOLOGY}
