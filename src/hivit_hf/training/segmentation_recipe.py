# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A training of a segmenter, as numbers."""

import math
from dataclasses import asdict, dataclass

from ..configuration_hivit import ARCHITECTURES
from .finetune_recipe import RUNTIME
from .recipe import Recipe, _field


_RUNTIME = RUNTIME - {"eval_batch_size"} | {"shown_pictures", "evaluate_only"}


@dataclass
class SegmentationRecipe(Recipe):
    """Every field is a flag of `examples/finetune_segmentation.py` and a recipe's key."""

    title: str = _field("", "What the recipe is, in a line.")
    source: str = _field("", "Where its numbers come from.")
    cost: str = _field("", "What it takes, and on what.")
    expected_result: str = _field("", "What it should lead to.")

    model_name_or_path: str | None = _field(None, "Folder or Hub name of any HiViT, or of a segmenter to go on with.")
    from_scratch: bool = _field(False, "Start with random weights of --architecture instead.")
    architecture: str | None = _field(None, f"The network that it must be: {', '.join(ARCHITECTURES)}.")
    model: str = _field("{}", "Changes to its configuration, as JSON, for example '{\"window_size\": 14}'.")
    drop_path_rate: float = _field(0.0, "Stochastic depth of the last layer.")
    freeze_backbone: bool = _field(False, "Learn the heads and the norms of the pyramid only.")
    head_channels: int = _field(512, "Width of UPerNet's decoder.")
    auxiliary_channels: int = _field(256, "Width of the auxiliary head on stage 3.")
    auxiliary_weight: float = _field(0.4, "Of the auxiliary head's loss; 0 for no such head.")

    dataset_name: str | None = _field(None, "Dataset of the Hub, or a folder of Parquet or a saved dataset.")
    dataset_config: str | None = _field(None, "Configuration of the Hub dataset.")
    dataset_revision: str | None = _field(None, "Commit of the Hub dataset.")
    train_split: str = _field("train", "Split to learn from.")
    eval_split: str | None = _field(None, "Split to evaluate with; 'validation' or 'test' if not given.")
    eval_fraction: float | None = _field(None, "Hold out this share of the training split to evaluate with.")
    image_column: str = _field("image", "The column with the pictures.")
    map_column: str = _field("annotation", "The column with the class maps: pictures of one channel.")
    label_names: list[str] = _field([], "Names of the classes, in the order of their numbers.")
    reduce_labels: bool = _field(False, "In the maps 0 is not labelled, and classes are counted from 1, as in ADE20K.")
    max_train_samples: int | None = _field(None, "Learn from so many pictures only.")
    max_eval_samples: int | None = _field(None, "Evaluate with so many pictures only.")
    check_images: int = _field(1000, "Samples of each split that are decoded before training, to find bad ones.")

    image_mean: list[float] = _field([], "Mean of each channel, in [0, 1]; the model's or ImageNet's if not given.")
    image_std: list[float] = _field([], "Deviation of each channel; the model's or ImageNet's if not given.")
    crop_size: int = _field(640, "Side in px of what is learnt from; a multiple of the patch size.")
    scale_range: list[float] = _field([0.5, 2.0], "Of the shorter side before the crop, relative to --crop_size.")
    max_class_share: float = _field(0.75, "Of a crop's labelled pixels that one class may cover, in ten tries.")
    flip_probability: float = _field(0.5, "Of a horizontal flip.")
    photometric: bool = _field(True, "Change brightness, contrast, saturation and hue.")
    num_workers: int = _field(4, "Processes that read and decode, for each training process.")

    eval_size: int | None = _field(None, "Shorter side in px of pictures in evaluations; --crop_size if not given.")
    eval_stride: int | None = _field(None, "Slide squares of --crop_size in such steps; else whole pictures.")
    eval_scales: list[float] = _field([1.0], "Look at each picture at these scales, and average.")
    eval_flip: bool = _field(False, "Look at the mirror images too.")
    evaluate_only: bool = _field(False, "Evaluate the segmenter --model_name_or_path and stop.")
    shown_pictures: int = _field(8, "Pictures of the evaluation that overlays.png shows; 0 for none.")

    total_steps: int = _field(80000, "Length of the training and of its schedule.")
    warmup_steps: int = _field(750, "Steps until the schedule is reached.")
    poly_power: float = _field(1.0, "Of what is left of the training, which the learning rate follows.")
    max_steps: int | None = _field(None, "Stop after so many steps; the schedule stays that of all.")
    batch_size: int = _field(4, "Pictures per process and forward pass; 2 or more.")
    effective_batch_size: int = _field(32, "Pictures per optimizer step, over all processes; reached by accumulation.")
    learning_rate: float = _field(1e-3, "Highest learning rate, of the heads.")
    weight_decay: float = _field(0.05, "Of the matrices; vectors, the position embedding and tables are not decayed.")
    adam_betas: list[float] = _field([0.9, 0.999], "Both betas of AdamW.")
    layer_decay: float = _field(1.0, "Factor of the learning rate from one layer to the one below; the stem is one.")
    clip_norm: float | None = _field(None, "Largest norm of the gradient; unlimited if not given.")
    ema_decay: float | None = _field(None, "Decay of a moving average of the weights, which is then what is kept.")
    early_stopping_patience: int | None = _field(None, "Evaluations without a better one after which to stop.")
    evaluate_every_steps: int = _field(8000, "Steps between evaluations and checkpoints.")
    mixed_precision: str = _field("bf16", "bf16, fp16 (with a gradient scaler) or no.")
    compile: bool = _field(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = _field(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = _field(0, "Of everything random.")

    output_dir: str | None = _field(None, "Where checkpoints, logs, figures and the model go.")
    resume: str | None = _field(None, "'latest', or the folder of a checkpoint to go on from.")
    keep_last: int = _field(2, "Checkpoints that are kept, the best among them.")
    log_every_steps: int = _field(50, "Steps between two lines of the log.")
    tracker: str = _field("tensorboard", "tensorboard, wandb or none.")
    push_to_hub: bool = _field(False, "Upload the model, its processor and its log at the end.")
    hub_model_id: str | None = _field(None, "Repository to upload to; named after the folder if not given.")
    hub_private_repo: bool = _field(False, "Make a new repository private.")
    show_layer_table: bool = _field(False, "Print ids, learning rates and decay of the parameters, and stop.")

    # what other fine-tunings choose and this one does not
    count_stem = False  # the dense numbering of layers
    eval_batch_size = 1  # pictures of any size

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
        if not self.dataset_name:
            raise ValueError("There is nothing to learn from: give --dataset_name.")
        if len(self.label_names) < 2:
            raise ValueError(f"Give the names of two classes or more with --label_names, got {self.label_names}.")
        if len(set(self.label_names)) < len(self.label_names):
            twice = sorted({name for name in self.label_names if self.label_names.count(name) > 1})
            raise ValueError(f"--label_names must differ, but {', '.join(twice)} is there more than once.")
        if not self.output_dir and not self.show_layer_table:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if bool(self.model_name_or_path) == self.from_scratch:
            raise ValueError("Give either --model_name_or_path, or --from_scratch with --architecture.")
        if self.from_scratch and not self.architecture:
            raise ValueError(f"--from_scratch needs --architecture: one of {', '.join(ARCHITECTURES)}.")
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}. Choose from {', '.join(ARCHITECTURES)}.")
        for name, allowed in (
            ("mixed_precision", ("bf16", "fp16", "no")),
            ("tracker", ("tensorboard", "wandb", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.eval_split and self.eval_fraction:
            raise ValueError("Give --eval_split or --eval_fraction, not both.")
        if self.evaluate_only and (self.from_scratch or self.resume):
            raise ValueError("--evaluate_only is of a trained segmenter: give --model_name_or_path, and no --resume.")
        if "drop_path_rate" in self.model_changes():
            raise ValueError("--model sets drop_path_rate, which has a flag of its own: use that.")
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo are for --push_to_hub: give it too.")

    def _check_ranges(self):
        positive = ["head_channels", "auxiliary_channels", "crop_size", "total_steps", "poly_power", "batch_size"]
        positive += ["effective_batch_size", "learning_rate", "evaluate_every_steps", "keep_last", "log_every_steps"]
        optional = ["eval_size", "eval_stride", "max_train_samples", "max_eval_samples", "max_steps", "clip_norm"]
        optional += ["early_stopping_patience"]
        for name in positive + [name for name in optional if getattr(self, name) is not None]:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("auxiliary_weight", "num_workers", "weight_decay", "check_images", "shown_pictures"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("flip_probability", "max_class_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        for name in ("eval_fraction", "ema_decay"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}. Published: 0.75 for base.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}. Published: 0.9 0.999.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")
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

    def identity(self) -> dict:
        """The numbers that a resumption must share with its run."""
        return {name: value for name, value in asdict(self).items() if name not in _RUNTIME}
