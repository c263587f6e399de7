# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments of masked pre-training: network, images, training. The defaults are those of the published recipe."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..configuration_hivit import ARCHITECTURES, HiViTConfig
from ..data.streaming import Source
from ..image_processing import IMAGENET_MEAN
from ..training.arguments import MAX_BATCH_SIZE, NetworkArguments, RecipeArguments
from ..training.command_line import (
    CHANGES_RECIPE,
    CHANGES_TOPOLOGY,
    MAY_CHANGE,
    OF_THE_MODEL,
    all_finite,
    all_positive,
    argument,
    ascending_pair,
    at_most,
    check_fields,
    decay_rate,
    fraction,
    nonnegative,
    one_of,
    positive,
    proper_fraction,
    side_px,
    within,
)


def known_trackers(names: list[str]):
    """Trackers of Accelerate, or none."""
    for name in names:
        one_of(*(tracker.value for tracker in LoggerType), "none")(name)


@dataclass
class PretrainingModelArguments(NetworkArguments):
    """The network, with random weights or those of a model."""

    model_name_or_path: str | None = argument(
        None, "Folder or Hub name of the model to begin with (random weights of --architecture)."
    )
    architecture: Annotated[str | None, one_of(*ARCHITECTURES)] = argument(
        None,
        f"Architecture of the network: {', '.join(ARCHITECTURES)} (base-mae). A model of another one is refused.",
    )
    image_size: Annotated[int | None, positive, side_px, OF_THE_MODEL] = argument(
        None, "Side of the training images in px (the model's, or 224)."
    )
    mask_ratio: Annotated[float, within(0, 1, high_included=False)] = argument(
        0.75, "Fraction of the patches that are masked."
    )
    norm_pix_loss: bool = argument(True, "Normalize the target pixels of each patch.")

    FLAGS_OF_THEIR_OWN: ClassVar[tuple[str, ...]] = ("image_size", "mask_ratio", "norm_pix_loss", "drop_path_rate")

    def __post_init__(self):
        super().__post_init__()
        if self.model_name_or_path is not None:
            return
        self.architecture, self.image_size = self.architecture or "base-mae", self.image_size or 224
        config = self.config()
        config.num_visible_units(math.prod(config.grid_size))

    def changes(self) -> dict:
        """What the flags say about the configuration, by keyword; without the image size if that is the model's."""
        flags = {name: getattr(self, name) for name in self.FLAGS_OF_THEIR_OWN if getattr(self, name) is not None}
        return self.overrides() | flags

    def config(self) -> HiViTConfig:
        """The configuration of a network from scratch. Raises ValueError if its numbers do not fit."""
        changes = {"use_relative_position_bias": False, **self.changes()}
        return HiViTConfig.from_architecture(self.architecture, **changes)


@dataclass
class PretrainingDataArguments:
    """The images."""

    _argument_group_name = "data"

    dataset_name: list[str] = argument([], "Datasets of the Hub, or folders of Parquet files, tars or images.")
    dataset_weights: Annotated[list[float], all_positive] = argument(
        [], "How often each dataset is read, relative to the others (all alike)."
    )
    dataset_config_name: str | None = argument(None, "Configuration of the Hub datasets.")
    dataset_revision: str | None = argument(None, "Commit, branch or tag of the Hub datasets.")
    train_dir: str | None = argument(None, "Folder of training images, instead of --dataset_name.")
    train_split_name: str = argument("train", "Split of Hub datasets, or sub-folder of folders, to train on.")
    image_column_name: str | None = argument(None, "Column of the images (the only one with images).")
    images_per_epoch: Annotated[int | None, positive] = argument(
        None, "Number of images of an epoch; a stream does not know its length."
    )
    crop_scale: Annotated[list[float], ascending_pair("0.2 1.0", high=1.0)] = argument(
        [0.2, 1.0], "Lower and upper bound of the random crop's area, as fractions of the image."
    )
    image_mean: Annotated[list[float], all_finite, OF_THE_MODEL] = argument(
        [], "Mean of each channel, in [0, 1] (the model's, or ImageNet's)."
    )
    image_std: Annotated[list[float], all_positive, OF_THE_MODEL] = argument(
        [], "Standard deviation of each channel (the model's, or ImageNet's)."
    )
    flip_probability: Annotated[float, fraction] = argument(0.5, "Probability of a horizontal flip.")
    shuffle_window: Annotated[int, positive] = argument(256, "Shuffle buffer size, in images, per worker.")
    max_bad_fraction: Annotated[float, fraction, MAY_CHANGE] = argument(
        0.01, "Maximum fraction of unreadable images, which are skipped."
    )

    eval_dataset_name: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Dataset of the validation images (the first training dataset)."
    )
    eval_dataset_config_name: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Configuration of the Hub dataset of validation images."
    )
    eval_split_name: Annotated[str, MAY_CHANGE] = argument(
        "validation", "Split of a Hub dataset, or sub-folder of a folder, of validation images."
    )
    eval_image_column_name: Annotated[str | None, MAY_CHANGE] = argument(None, "Column of the validation images.")
    validation_dir: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Folder of validation images, instead of --eval_dataset_name."
    )
    label_column_name: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Column of class numbers, for the kNN accuracy of the validation images."
    )
    max_eval_samples: Annotated[int, positive, MAY_CHANGE] = argument(256, "Number of validation images.")

    def __post_init__(self):
        check_fields(self)
        if bool(self.dataset_name) == bool(self.train_dir):
            raise ValueError("There is nothing to read: give either --dataset_name, or --train_dir.")
        if self.dataset_weights and len(self.dataset_weights) != len(self.names):
            raise ValueError(f"{len(self.names)} datasets need as many weights, got {self.dataset_weights}.")
        if self.images_per_epoch is None:
            raise ValueError("A stream does not know its length: give --images_per_epoch (ImageNet-1k: 1281167).")
        if self.eval_dataset_name and self.validation_dir:
            raise ValueError("Give --eval_dataset_name or --validation_dir, not both.")
        if self.label_column_name and not (self.eval_dataset_name or self.validation_dir):
            raise ValueError("label_column_name is of the validation images: give --eval_dataset_name as well.")
        for name in ("dataset_config_name", "dataset_revision"):
            if getattr(self, name) is not None and all(Path(folder).is_dir() for folder in self.names):
                raise ValueError(f"{name} is of datasets of the Hub, but {', '.join(self.names)} are folders.")

    @property
    def names(self) -> list[str]:
        """Names and folders of the training datasets."""
        return self.dataset_name or [self.train_dir]

    def train_sources(self) -> list[Source]:
        """Where the training images come from."""
        weights = self.dataset_weights or [1.0] * len(self.names)
        where = (self.dataset_config_name, self.train_split_name, self.dataset_revision, self.image_column_name)
        return [Source(name, *where, weight) for name, weight in zip(self.names, weights)]

    def eval_source(self) -> Source | None:
        """Where the validation images come from, if not from the training datasets."""
        name = self.eval_dataset_name or self.validation_dir
        if name is None:
            return None
        config, column, revision = self.eval_dataset_config_name, self.eval_image_column_name, None
        if name in self.names:
            config, column = config or self.dataset_config_name, column or self.image_column_name
            revision = self.dataset_revision
        return Source(name, config, self.eval_split_name, revision, column, label_column=self.label_column_name)


@dataclass
class PretrainingArguments(RecipeArguments):
    """The training. Names that `TrainingArguments` of transformers has mean what they mean there."""

    output_dir: Annotated[str | None, MAY_CHANGE] = argument(None, "Folder of checkpoints, logs, images and the model.")
    num_train_epochs: Annotated[float, positive] = argument(1600, "Number of training epochs.")
    per_device_train_batch_size: Annotated[int, positive, CHANGES_TOPOLOGY] = argument(
        64, "Training batch size per device and forward pass."
    )
    effective_batch_size: Annotated[int, positive, at_most(MAX_BATCH_SIZE)] = argument(
        4096, "Number of images per optimizer step over all devices; gradients are accumulated to reach it."
    )
    base_learning_rate: Annotated[float, positive, CHANGES_RECIPE] = argument(
        1e-4, "Peak learning rate for 256 images per step."
    )
    min_learning_rate: Annotated[float, nonnegative, CHANGES_RECIPE] = argument(
        0.0, "Learning rate at the end of the cosine schedule."
    )
    warmup_epochs: Annotated[float, nonnegative, CHANGES_RECIPE] = argument(40, "Number of warmup epochs.")
    weight_decay: Annotated[float, nonnegative, CHANGES_RECIPE] = argument(
        0.05, "Weight decay of matrices; vectors have none."
    )
    adam_beta2: Annotated[float, decay_rate] = argument(0.95, "Second beta of AdamW.")
    ema_decay: Annotated[float | None, proper_fraction] = argument(
        None, "Decay of a moving average of the weights, which is saved beside them."
    )
    bf16: Annotated[bool, CHANGES_RECIPE] = argument(True, "Mixed precision in bfloat16.")
    fp16: Annotated[bool, CHANGES_RECIPE] = argument(False, "Mixed precision in float16, with a gradient scaler.")
    torch_compile: bool = argument(False, "Compile the network with torch.compile.")
    seed: Annotated[int, within(0, 2**32, high_included=False)] = argument(42, "Random seed.")

    eval_steps: Annotated[int, positive, MAY_CHANGE] = argument(1000, "Number of steps between two evaluations.")
    logging_steps: Annotated[int, positive, MAY_CHANGE] = argument(20, "Number of steps between two lines of the log.")
    log_samples: Annotated[bool, MAY_CHANGE] = argument(
        False, "Log the samples of each step, by rank, in samples_rank*.jsonl."
    )
    report_to: Annotated[list[str], known_trackers, MAY_CHANGE] = argument(
        ["tensorboard"], "Trackers: tensorboard, wandb, none, ..."
    )
    disable_tqdm: Annotated[bool, MAY_CHANGE] = argument(False, "No progress bar.")
    save_steps: Annotated[int, positive, MAY_CHANGE] = argument(1000, "Number of steps between two checkpoints.")
    save_total_limit: Annotated[int, positive, MAY_CHANGE] = argument(2, "Number of newest checkpoints to keep.")
    keep_every_steps: Annotated[int, nonnegative, MAY_CHANGE] = argument(
        0, "Checkpoints at multiples of this step are always kept; 0 for none."
    )
    resume_from_checkpoint: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Folder of the checkpoint to resume from, or latest."
    )
    allow_topology_change: Annotated[bool, MAY_CHANGE] = argument(
        False,
        "Resume with another number of ranks or workers, or batch size; unfinished shuffle windows are read again.",
    )
    allow_recipe_change: Annotated[bool, MAY_CHANGE] = argument(
        False, "Resume with another learning rate, warmup, weight decay, clipping or precision, after a divergence."
    )
    push_to_hub: Annotated[bool, MAY_CHANGE] = argument(False, "Upload checkpoints to the Hub, in the background.")
    hub_model_id: Annotated[str | None, MAY_CHANGE] = argument(
        None, "Repository of the uploads (the name of the output folder)."
    )
    hub_private_repo: Annotated[bool, MAY_CHANGE] = argument(True, "Make a new repository private.")

    def __post_init__(self):
        check_fields(self)
        if not self.output_dir:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if self.bf16 and self.fp16:
            raise ValueError("Give --bf16 or --fp16, not both: --bf16 false --fp16 true for float16.")
        if self.min_learning_rate > self.peak_learning_rate:
            raise ValueError(
                f"min_learning_rate must not exceed the peak learning rate, {self.peak_learning_rate:.3g}, got "
                f"{self.min_learning_rate}."
            )
        if self.max_steps <= 0 and self.warmup_epochs >= self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs must be less than num_train_epochs {self.num_train_epochs}, got {self.warmup_epochs}."
            )
        for name in ("allow_topology_change", "allow_recipe_change"):
            if getattr(self, name) and not self.resume_from_checkpoint:
                raise ValueError(f"{name} is about resumptions: give --resume_from_checkpoint as well.")
        if self.keep_every_steps % self.save_steps:
            raise ValueError(
                f"keep_every_steps {self.keep_every_steps} must be a multiple of save_steps {self.save_steps}, as only "
                "those exist."
            )
        missing = sorted({*self.report_to} - {"none", "all"} - {tracker.value for tracker in get_available_trackers()})
        if missing:
            raise ValueError(
                f"report_to {missing[0]} is not installed: pip install {missing[0]}, or give --report_to tensorboard."
            )
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError("--hub_model_id is for --push_to_hub: give it too.")

    @property
    def mixed_precision(self) -> str:
        """As Accelerate names it."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "no"

    def steps_per_epoch(self, images_per_epoch: int) -> float:
        """Optimizer steps of an epoch."""
        return images_per_epoch / self.effective_batch_size

    def num_steps(self, images_per_epoch: int) -> int:
        """Optimizer steps of the whole training."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, round(self.num_train_epochs * self.steps_per_epoch(images_per_epoch)))

    def num_warmup_steps(self, images_per_epoch: int) -> float:
        """Optimizer steps of the warmup, less than all. Raises ValueError if --max_steps leaves no room for it."""
        warmup = self.warmup_epochs * self.steps_per_epoch(images_per_epoch)
        steps = self.num_steps(images_per_epoch)
        if self.max_steps > 0 and warmup >= steps:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} are {warmup:.6g} steps, but max_steps is {steps}.")
        return min(warmup, steps - 1)


def check_arguments(
    accelerator: Accelerator,
    model_args: PretrainingModelArguments,
    data_args: PretrainingDataArguments,
    training_args: PretrainingArguments,
):
    """ValueError for arguments that do not fit together, or not these processes."""
    if model_args.model_name_or_path is None:
        channels = model_args.config().num_channels
        for name in ("image_mean", "image_std"):
            if len(getattr(data_args, name) or IMAGENET_MEAN) != channels:
                raise ValueError(f"{name} needs {channels} numbers, got {getattr(data_args, name)}.")
    training_args.num_warmup_steps(data_args.images_per_epoch)
    training_args.accumulation_steps(training_args.per_device_train_batch_size, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        for name, value in (("ema_decay", training_args.ema_decay), ("label_column_name", data_args.label_column_name)):
            if value is not None:  # both use weights outside of a training step
                raise ValueError(f"{name} needs the whole weights in each process: leave it out with FSDP.")
