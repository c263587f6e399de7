# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A training as numbers: what YAML files hold, what flags change, and what a resumption must agree with."""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..configuration_hivit import ARCHITECTURES, HiViTConfig
from .stream import Source


# What may differ between a run and its resumption: what the recipe says of itself, and where and how often it writes.
RUNTIME = {"title", "source", "cost", "expected_result", "max_steps", "output_dir", "resume", "checkpoint_every_steps"}
RUNTIME |= {"keep_last", "keep_every_steps", "log_every_steps", "log_samples", "tracker", "monitor_every_steps"}
RUNTIME |= {"eval_dataset_name", "eval_split", "label_column", "monitor_images", "hub_model_id", "hub_private"}
RUNTIME |= {"eval_config", "eval_image_column", "allow_topology_change", "allow_recipe_change", "max_bad_fraction"}
TOPOLOGY = {"num_workers", "batch_size"}  # may differ if that is asked for


def _field(default, text: str):
    """A field with its help text."""
    metadata = {"help": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _as(kind, value, name: str):
    """A value of a recipe file as its field wants it; YAML reads 1e-4 as a string, and one item is no list."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in options:
        return None
    wanted = options[0]
    if get_origin(wanted) is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [_as(get_args(wanted)[0], item, name) for item in items]
    if wanted is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    elif type(value) is wanted:
        return value
    raise ValueError(f"{name} must be a {wanted.__name__}, got {value!r}.")


@dataclass
class Recipe:
    """What recipes share: values are brought to the types of their fields, and batches add up to the published ones."""

    title: str = _field("", "Say what the recipe is, in a line.")
    source: str = _field("", "Say where its numbers come from.")
    cost: str = _field("", "Say what it takes, and on what.")
    expected_result: str = _field("", "Say what it should lead to.")

    def __post_init__(self):
        if isinstance(self.model, dict):
            self.model = json.dumps(self.model)
        kinds = get_type_hints(type(self))  # HfArgumentParser changes the types in `fields`
        for name in (item.name for item in fields(self)):
            setattr(self, name, _as(kinds[name], getattr(self, name), name))

    def model_changes(self) -> dict:
        """What `model` changes in the configuration. Raises ValueError if it is not JSON."""
        try:
            changes = json.loads(self.model)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--model must be a JSON object such as '{{\"patch_size\": 8}}', got {self.model}."
            ) from error
        if not isinstance(changes, dict):
            raise ValueError(f"--model must be a JSON object, got {self.model}.")
        return changes

    def accumulation_steps(self, num_processes: int) -> int:
        """Forward passes per optimizer step. Raises ValueError if they do not come out even."""
        together = self.batch_size * num_processes
        if self.effective_batch_size % together:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is no multiple of {self.batch_size} pictures on "
                f"{num_processes} processes: choose batch_size so that it is."
            )
        return self.effective_batch_size // together

    @property
    def learning_rate(self) -> float:
        """The highest one, by the linear rule of MAE: for 256 pictures, times the pictures per step."""
        return self.base_learning_rate * self.effective_batch_size / 256


@dataclass
class PretrainRecipe(Recipe):
    """A masked pre-training. Every field is a flag of `examples/pretrain_mim.py` and a key of a recipe file."""

    architecture: str = _field("base-mae", f"Train this network: {', '.join(ARCHITECTURES)}.")
    model: str = _field("{}", "Change the configuration by this JSON, for example '{\"patch_size\": 8}'.")
    image_size: int = _field(224, "Train with pictures of this side in px.")
    mask_ratio: float = _field(0.75, "Hide this share of the units.")
    drop_path_rate: float = _field(0.0, "Drop paths of the last layer at this rate (stochastic depth).")

    dataset_name: list[str] = _field([], "Read datasets of the Hub, or folders of Parquet files, tars or pictures.")
    dataset_weights: list[float] = _field([], "Read each of them this often; all are read alike if not given.")
    dataset_config: str | None = _field(None, "Take this configuration of the Hub datasets.")
    dataset_split: str = _field("train", "Read this split of Hub datasets, or sub-folder of folders that have some.")
    dataset_revision: str | None = _field(None, "Take this commit of the Hub datasets.")
    image_column: str | None = _field(None, "Find the pictures in this column, if it cannot be told.")
    images_per_epoch: int | None = _field(None, "Count so many pictures as an epoch; a stream knows no length.")
    crop_scale: list[float] = _field([0.2, 1.0], "Crop from the first to the second of these shares of a picture.")
    image_mean: list[float] = _field([0.485, 0.456, 0.406], "Subtract these means of the channels, in [0, 1].")
    image_std: list[float] = _field([0.229, 0.224, 0.225], "Divide by these standard deviations of the channels.")
    flip_probability: float = _field(0.5, "Flip pictures horizontally with this probability.")
    shuffle_window: int = _field(256, "Shuffle so many pictures among each other; each worker holds them in memory.")
    max_bad_fraction: float = _field(0.01, "Skip pictures that cannot be read, up to this share.")
    num_workers: int = _field(4, "Read and decode in so many processes, for each training process.")

    eval_dataset_name: str | None = _field(None, "Look at this dataset's held-out pictures; else at training ones.")
    eval_split: str = _field("validation", "Look at this split of a Hub dataset, or sub-folder of a folder.")
    eval_config: str | None = _field(None, "Take this configuration of that Hub dataset.")
    eval_image_column: str | None = _field(None, "Find its pictures in this column, if it cannot be told.")
    label_column: str | None = _field(None, "Probe held-out pictures by nearest neighbours with this column of labels.")
    monitor_images: int = _field(256, "Look at so many held-out pictures.")
    monitor_every_steps: int = _field(1000, "Look at them every so many steps.")

    epochs: float = _field(1600, "Train for so many epochs.")
    warmup_epochs: float = _field(40, "Reach the highest learning rate after so many epochs.")
    max_steps: int | None = _field(None, "Stop after so many steps; the schedule stays that of all epochs.")
    batch_size: int = _field(64, "Take so many pictures per process and forward pass.")
    effective_batch_size: int = _field(4096, "Accumulate so many pictures, over all processes, for an optimizer step.")
    base_learning_rate: float = _field(1e-4, "Reach this learning rate for 256 pictures per step; it grows with them.")
    min_learning_rate: float = _field(0.0, "End the cosine at this learning rate.")
    weight_decay: float = _field(0.05, "Decay matrices this much; vectors are not decayed.")
    adam_betas: list[float] = _field([0.9, 0.95], "Set both betas of AdamW.")
    clip_norm: float | None = _field(None, "Limit the norm of the gradient to this; it is unlimited if not given.")
    ema_decay: float | None = _field(None, "Keep a moving average of the weights with this decay, if given.")
    mixed_precision: str = _field("bf16", "Choose the mixed precision: bf16, fp16 (with a gradient scaler) or no.")
    compile: bool = _field(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = _field(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = _field(0, "Seed everything random with this number.")

    output_dir: str | None = _field(None, "Write checkpoints, logs, pictures and the model to this folder.")
    resume: str | None = _field(None, "Resume from 'latest', or from the folder of a checkpoint.")
    allow_topology_change: bool = _field(
        False, "Resume with other processes, workers or batch_size; shards that were not finished are read again."
    )
    allow_recipe_change: bool = _field(
        False, "Resume with another learning rate, warm-up, decay, clipping or precision, after a run has diverged."
    )
    checkpoint_every_steps: int = _field(1000, "Write a checkpoint every so many steps.")
    keep_last: int = _field(2, "Keep so many of the newest checkpoints.")
    keep_every_steps: int = _field(0, "Keep checkpoints of multiples of so many steps for good; 0 for none.")
    log_every_steps: int = _field(20, "Write a line of the log and the trackers every so many steps.")
    log_samples: bool = _field(False, "Write what each process read, step by step, to samples_rank*.jsonl.")
    tracker: str = _field("tensorboard", "Track the run with tensorboard, wandb or none.")
    hub_model_id: str | None = _field(None, "Upload checkpoints to this repository of the Hub, in the background.")
    hub_private: bool = _field(True, "Make that repository private, if it has to be made.")

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
            raise ValueError("label_column is of the held-out pictures: give --eval_dataset_name as well.")
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


def read_recipe(path: str | Path, recipe_class: type[Recipe] = PretrainRecipe) -> dict:
    """
    The keys of a recipe file.

    Raises:
        ValueError: if it cannot be read, or has a key that no such recipe has.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}") from error
    known = [item.name for item in fields(recipe_class)]
    unknown = sorted(set(values) - set(known)) if isinstance(values, dict) else None
    if unknown is None:
        raise ValueError(f"The recipe {path} must hold keys and values, got a {type(values).__name__}.")
    if unknown:
        raise ValueError(
            f"The recipe {path} has {', '.join(unknown)}, which no recipe has. The keys are {', '.join(known)}."
        )
    return values


def check_numbers(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    positive: Sequence[str] = (),
    nonnegative: Sequence[str] = (),
):
    """Ends the program with a sentence if one of these flags, where it is given, is not a number of that kind."""
    for name in (*positive, *nonnegative):
        value = getattr(arguments, name)
        if value is not None and (value < 0 or (value == 0 and name in positive)):
            parser.error(f"--{name} must {'be positive' if name in positive else 'not be negative'}, got {value}.")


def settings(arguments: argparse.Namespace) -> dict:
    """What was asked for, to be written beside the figures."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def one_sentence(error: Exception) -> str:
    """What happened, without the stack that the error of a data loader's worker brings along as text."""
    name, module = type(error).__name__, type(error).__module__
    last = (str(error).strip() or name).splitlines()[-1]
    return last.removeprefix(f"{module}.{name}: ").removeprefix(f"{name}: ")


def parse_recipe(recipe_class: type[Recipe], description: str, argv: list[str] | None = None) -> Recipe:
    """The recipe that a command line asks for: a file's numbers, changed by flags. Exits with 2 if it cannot be."""
    parser = HfArgumentParser(recipe_class, description=description)
    parser.add_argument("--config", "--recipe", help="Read a recipe file; flags go before its numbers.")
    known, _ = parser.parse_known_args(argv)
    try:
        if known.config:
            parser.set_defaults(**read_recipe(known.config, recipe_class))
        arguments = vars(parser.parse_args(argv))
        arguments.pop("config")
        recipe = recipe_class(**arguments)
        recipe.check()
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return recipe
