# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Command lines and recipe files."""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import ClassVar, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..configuration_hivit import ARCHITECTURES


def argument(default, text: str):
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

    title: str = argument("", "Say what the recipe is, in a line.")
    source: str = argument("", "Say where its numbers come from.")
    cost: str = argument("", "Say what it takes, and on what.")
    expected_result: str = argument("", "Say what it should lead to.")

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
                f"effective_batch_size {self.effective_batch_size} is no multiple of {self.batch_size} images on "
                f"{num_processes} processes: choose batch_size so that it is."
            )
        return self.effective_batch_size // together

    @property
    def learning_rate(self) -> float:
        """The highest one, by the linear rule of MAE: for 256 images, times the images per step."""
        return self.base_learning_rate * self.effective_batch_size / 256


def read_recipe(path: str | Path, recipe_class: type[Recipe]) -> dict:
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

    model_name_or_path: str | None = argument(None, "Start from this folder or Hub name of a HiViT or classifier.")
    from_scratch: bool = argument(False, "Start with random weights of --architecture instead.")
    architecture: str | None = argument(None, f"Train this network and no other: {', '.join(ARCHITECTURES)}.")
    model: str = argument("{}", "Change the configuration by this JSON, for example '{\"window_size\": 14}'.")
    drop_path_rate: float = argument(0.0, "Drop paths of the last layer at this rate (stochastic depth).")

    max_train_samples: int | None = argument(None, "Learn from so many images only.")
    max_eval_samples: int | None = argument(None, "Evaluate with so many images only.")
    check_images: int = argument(1000, "Decode so many images of each split before training, to find bad ones.")
    image_mean: list[float] = argument([], "Subtract these means, in [0, 1]; the model's or ImageNet's if not given.")
    image_std: list[float] = argument([], "Divide by these deviations; the model's or ImageNet's if not given.")
    flip_probability: float = argument(0.5, "Flip images horizontally with this probability.")
    num_workers: int = argument(4, "Read and decode in so many processes, for each training process.")

    max_steps: int | None = argument(None, "Stop after so many steps; the schedule stays that of the whole training.")
    batch_size: int = argument(32, "Take so many images per process and forward pass.")
    effective_batch_size: int = argument(64, "Accumulate so many images, over all processes, for an optimizer step.")
    weight_decay: float = argument(0.05, "Decay matrices this much, but no vectors, position embedding or tables.")
    adam_betas: list[float] = argument([0.9, 0.999], "Set both betas of AdamW.")
    layer_decay: float = argument(1.0, "Multiply the learning rate by this from one layer to the one below.")
    clip_norm: float | None = argument(None, "Limit the norm of the gradient to this; it is unlimited if not given.")
    ema_decay: float | None = argument(None, "Save a moving average of the weights with this decay as the model.")
    early_stopping_patience: int | None = argument(None, "Stop after so many evaluations without a better one.")
    evaluate_every_steps: int | None = argument(None, "Evaluate and save every so many steps, else every epoch.")
    mixed_precision: str = argument("bf16", "Choose the mixed precision: bf16, fp16 (with a gradient scaler) or no.")
    gradient_checkpointing: bool = argument(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = argument(0, "Seed everything random with this number.")

    output_dir: str | None = argument(None, "Write checkpoints, logs, figures, images and the model to this folder.")
    resume: str | None = argument(None, "Resume from 'latest', or from the folder of a checkpoint.")
    keep_last: int = argument(2, "Keep so many checkpoints, the best among them.")
    log_every_steps: int = argument(20, "Write a line of the log every so many steps.")
    tracker: str = argument("tensorboard", "Track the run with tensorboard, wandb or none.")
    push_to_hub: bool = argument(False, "Upload the model, its processor and its log at the end.")
    hub_model_id: str | None = argument(None, "Upload to this repository; it is named after the folder if not given.")
    hub_private_repo: bool = argument(False, "Make a new repository private.")
    show_layer_table: bool = argument(False, "Print ids, learning rates and decay of the parameters, and stop.")

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

    dataset_name: str | None = argument(
        None, "Read a dataset of the Hub, a folder of images or Parquet, or a saved dataset."
    )
    dataset_config: str | None = argument(None, "Take this configuration of the Hub dataset.")
    dataset_revision: str | None = argument(None, "Take this commit of the Hub dataset.")
    train_split: str = argument("train", "Learn from this split.")
    eval_split: str | None = argument(None, "Evaluate with this split; 'validation' or 'test' if not given.")
    eval_fraction: float | None = argument(None, "Hold out this share of the training split to evaluate with.")
    label_names: list[str] = argument([], "Name the classes, in the order of their numbers.")
    compile: bool = argument(False, "Compile the network with torch.compile.")

    FRACTIONS: ClassVar[tuple[str, ...]] = ("eval_fraction",)

    def _check_choices(self):
        if not self.dataset_name:
            raise ValueError("There is nothing to learn from: give --dataset_name.")
        super()._check_choices()
        if self.eval_split and self.eval_fraction:
            raise ValueError("Give --eval_split or --eval_fraction, not both.")
