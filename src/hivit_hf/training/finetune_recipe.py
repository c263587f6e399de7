# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A fine-tuning, or a supervised training from scratch, as numbers."""

import math
from dataclasses import asdict, dataclass

from ..configuration_hivit import ARCHITECTURES, PROBLEM_TYPES
from .recipe import Recipe, _field


# What may differ between a run and its resumption.
RUNTIME = {"title", "source", "cost", "expected_result", "max_steps", "output_dir", "resume", "keep_last", "tracker"}
RUNTIME |= {"log_every_steps", "num_workers", "check_images", "push_to_hub", "hub_model_id", "hub_private_repo"}
RUNTIME |= {"show_layer_table", "eval_batch_size", "compile", "gradient_checkpointing"}


@dataclass
class FinetuneRecipe(Recipe):
    """A supervised training. Every field is a flag of `examples/finetune_classification.py` and a recipe's key."""

    title: str = _field("", "What the recipe is, in a line.")
    source: str = _field("", "Where its numbers come from.")
    cost: str = _field("", "What it takes, and on what.")
    expected_result: str = _field("", "What it should lead to.")

    model_name_or_path: str | None = _field(None, "Folder or Hub name of a pre-trained HiViT or of a classifier.")
    from_scratch: bool = _field(False, "Start with random weights of --architecture instead.")
    architecture: str | None = _field(None, f"The network that it must be: {', '.join(ARCHITECTURES)}.")
    model: str = _field("{}", "Changes to its configuration, as JSON, for example '{\"pooler_layernorm\": false}'.")
    problem_type: str = _field("single_label_classification", f"What is learnt: {', '.join(PROBLEM_TYPES)}.")
    image_size: int | None = _field(None, "Side of the pictures in px; that of the model is kept if not given.")
    drop_path_rate: float = _field(0.0, "Stochastic depth of the last layer.")
    head_init_std: float | None = _field(None, "Deviation of a new classifier's weights; the model's if not given.")
    draw_relative_tables: bool = _field(False, "Draw new relative tables at random; they start at zero otherwise.")
    lora_rank: int | None = _field(None, "Learn low-rank changes of the attention by PEFT instead of all weights.")

    dataset_name: str | None = _field(None, "Dataset of the Hub, or a folder of pictures, Parquet or a saved dataset.")
    dataset_config: str | None = _field(None, "Configuration of the Hub dataset.")
    dataset_revision: str | None = _field(None, "Commit of the Hub dataset.")
    train_split: str = _field("train", "Split to learn from.")
    eval_split: str | None = _field(None, "Split to evaluate with; 'validation' or 'test' if not given.")
    eval_fraction: float | None = _field(None, "Hold out this share of the training split to evaluate with.")
    image_column: str | None = _field(None, "The column with the pictures, if it cannot be told.")
    label_column: list[str] = _field([], "The column with the labels, if it cannot be told, or several with one each.")
    label_names: list[str] = _field([], "Names of the classes, where labels are bare numbers.")
    max_train_samples: int | None = _field(None, "Learn from so many pictures only.")
    max_eval_samples: int | None = _field(None, "Evaluate with so many pictures only.")
    check_images: int = _field(1000, "Pictures of each split that are decoded before training, to find bad ones.")

    image_mean: list[float] = _field([], "Mean of each channel, in [0, 1]; the model's or ImageNet's if not given.")
    image_std: list[float] = _field([], "Deviation of each channel; the model's or ImageNet's if not given.")
    crop_scale: list[float] = _field([0.08, 1.0], "Smallest and largest share of a picture that a crop covers.")
    flip_probability: float = _field(0.5, "Of a horizontal flip.")
    auto_augment: str | None = _field(None, "Policy of timm, such as rand-m9-mstd0.5-inc1 of the paper.")
    color_jitter: float = _field(0.0, "Strength of colour jitter; a policy replaces it, as in timm.")
    random_erasing: float = _field(0.0, "Probability of filling a random box with noise.")
    mixup: float = _field(0.0, "Alpha of mixup; 0 for none.")
    cutmix: float = _field(0.0, "Alpha of cutmix; 0 for none.")
    mixup_probability: float = _field(1.0, "Share of the batches that are mixed.")
    mixup_switch_probability: float = _field(0.5, "Share of the mixed batches that are cut rather than blended.")
    label_smoothing: float = _field(0.0, "Share of the target that is spread over all classes.")
    crop_pct: float | None = _field(None, "Share of the shorter side seen in evaluations; 0.875 up to 224 px, then 1.")
    num_workers: int = _field(4, "Processes that read and decode, for each training process.")

    epochs: float = _field(20, "Length of the training.")
    warmup_epochs: float = _field(2, "Epochs until the highest learning rate is reached.")
    max_steps: int | None = _field(None, "Stop after so many steps; the schedule stays that of all epochs.")
    batch_size: int = _field(32, "Pictures per process and forward pass.")
    effective_batch_size: int = _field(64, "Pictures per optimizer step, over all processes; reached by accumulation.")
    eval_batch_size: int = _field(64, "Pictures per process in evaluations.")
    base_learning_rate: float = _field(5e-4, "Highest learning rate for 256 pictures per step; it grows with them.")
    min_learning_rate: float = _field(0.0, "What the cosine ends at.")
    warmup_learning_rate: float = _field(0.0, "What the warm-up begins with.")
    weight_decay: float = _field(0.05, "Of the matrices; vectors, the position embedding and tables are not decayed.")
    adam_betas: list[float] = _field([0.9, 0.999], "Both betas of AdamW.")
    layer_decay: float = _field(1.0, "Factor of the learning rate from one layer to the one below.")
    count_stem: bool = _field(True, "Count each layer of the stem for the decay; else the whole stem is layer 0.")
    clip_norm: float | None = _field(None, "Largest norm of the gradient; unlimited if not given.")
    ema_decay: float | None = _field(None, "Decay of a moving average of the weights, which is then what is kept.")
    early_stopping_patience: int | None = _field(None, "Evaluations without a better one after which to stop.")
    evaluate_every_steps: int | None = _field(None, "Steps between evaluations and checkpoints; an epoch otherwise.")
    mixed_precision: str = _field("bf16", "bf16, fp16 (with a gradient scaler) or no.")
    compile: bool = _field(False, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = _field(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = _field(0, "Of everything random.")

    output_dir: str | None = _field(None, "Where checkpoints, logs, figures and the model go.")
    resume: str | None = _field(None, "'latest', or the folder of a checkpoint to go on from.")
    keep_last: int = _field(2, "Checkpoints that are kept, the best among them.")
    log_every_steps: int = _field(20, "Steps between two lines of the log.")
    tracker: str = _field("tensorboard", "tensorboard, wandb or none.")
    push_to_hub: bool = _field(False, "Upload the model, its processor and its log at the end.")
    hub_model_id: str | None = _field(None, "Repository to upload to; named after the folder if not given.")
    hub_private_repo: bool = _field(False, "Make a new repository private.")
    show_layer_table: bool = _field(False, "Print ids, learning rates and decay of the parameters, and stop.")

    def check(self):
        """
        Everything that can be known before anything is read.

        Raises:
            ValueError: what does not fit, what was given, and what would do.
        """
        self._check_choices()
        self._check_ranges()
        self._check_targets()
        self.model_changes()
        self.accumulation_steps(1)

    def _check_choices(self):
        if not self.dataset_name:
            raise ValueError("There is nothing to learn from: give --dataset_name.")
        if not self.output_dir and not self.show_layer_table:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if bool(self.model_name_or_path) == self.from_scratch:
            raise ValueError("Give either --model_name_or_path, or --from_scratch with --architecture.")
        if self.from_scratch and not self.architecture:
            raise ValueError(f"--from_scratch needs --architecture: one of {', '.join(ARCHITECTURES)}.")
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}. Choose from {', '.join(ARCHITECTURES)}.")
        choices = {"mixed_precision": ("bf16", "fp16", "no"), "tracker": ("tensorboard", "wandb", "none")}
        for name, allowed in (choices | {"problem_type": tuple(PROBLEM_TYPES)}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.eval_split and self.eval_fraction:
            raise ValueError("Give --eval_split or --eval_fraction, not both.")
        if self.lora_rank is not None and (self.draw_relative_tables or self.ema_decay):
            raise ValueError(
                "--lora_rank keeps the weights as they are: leave out --draw_relative_tables, --ema_decay."
            )
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo are for --push_to_hub: give it too.")

    def _check_ranges(self):
        positive = ["epochs", "batch_size", "effective_batch_size", "eval_batch_size", "base_learning_rate"]
        positive += ["keep_last", "log_every_steps"]
        optional = ["image_size", "head_init_std", "lora_rank", "max_train_samples", "max_eval_samples", "max_steps"]
        optional += ["clip_norm", "early_stopping_patience", "evaluate_every_steps"]
        for name in positive + [name for name in optional if getattr(self, name) is not None]:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        nonnegative = ["num_workers", "weight_decay", "min_learning_rate", "warmup_learning_rate", "mixup", "cutmix"]
        for name in [*nonnegative, "color_jitter", "check_images"]:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        shares = ["flip_probability", "random_erasing", "mixup_probability", "mixup_switch_probability"]
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        for name in ("eval_fraction", "ema_decay"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct}. Published: 0.875.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}. Published: 0.85 for base.")
        for name in ("label_smoothing", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}. Published: 0.9 0.999.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two shares such as 0.08 1.0, got {self.crop_scale}.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")
        for name in ("min_learning_rate", "warmup_learning_rate"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(f"{name} must not exceed the highest rate, {self.learning_rate:.3g}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs {self.epochs}, got {self.warmup_epochs}.")

    def _check_targets(self):
        if self.problem_type != "single_label_classification":
            for name in ("mixup", "cutmix", "label_smoothing"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for one label per picture: leave it out for {self.problem_type}.")
        elif len(self.label_column) > 1:
            raise ValueError(
                f"One label per picture is one column, got {', '.join(self.label_column)}: give one --label_column, "
                "or --problem_type multi_label_classification."
            )
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"mixup and cutmix mix pictures in pairs, so batch_size must be even, got {self.batch_size}: "
                f"use {self.batch_size + 1}, or --mixup 0 --cutmix 0."
            )

    def identity(self) -> dict:
        """The numbers that a resumption must share with its run."""
        return {name: value for name, value in asdict(self).items() if name not in RUNTIME}
