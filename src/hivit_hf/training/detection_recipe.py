# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The training of a detector, as numbers."""

import json
import math
from dataclasses import asdict, dataclass

from ..configuration_hivit import ARCHITECTURES
from .detector import DETECTORS
from .finetune_recipe import RUNTIME
from .recipe import Recipe, _field


@dataclass
class DetectionRecipe(Recipe):
    """The training of a detector. Every field is a flag of `examples/finetune_detection.py` and a recipe's key."""

    title: str = _field("", "What the recipe is, in a line.")
    source: str = _field("", "Where its numbers come from.")
    cost: str = _field("", "What it takes, and on what.")
    expected_result: str = _field("", "What it should lead to.")

    model_name_or_path: str | None = _field(None, "Folder or Hub name of a pre-trained HiViT or of a classifier.")
    from_scratch: bool = _field(False, "Start with random weights of --architecture instead.")
    architecture: str | None = _field(None, f"The network that it must be: {', '.join(ARCHITECTURES)}.")
    model: str = _field("{}", "Changes to its configuration, as JSON, for example '{\"window_size\": 14}'.")
    drop_path_rate: float = _field(0.0, "Stochastic depth of the last layer.")
    freeze_backbone: bool = _field(False, "Keep the network as it is and learn the norms of its levels and the rest.")
    detector: str = _field("mask_rcnn", f"What finds the objects: {', '.join(DETECTORS)}.")
    head: str = _field("{}", "Changes to the detector's configuration, as JSON, for example '{\"fpn_channels\": 64}'.")

    train_annotations: str | None = _field(None, "Annotations to learn from, a JSON file in COCO's format.")
    train_images: str | None = _field(None, "Folder of their pictures; that of the file if not given.")
    eval_annotations: str | None = _field(None, "Annotations to evaluate with, of the same categories.")
    eval_images: str | None = _field(None, "Folder of their pictures; that of the file if not given.")
    bad_annotations: str = _field("refuse", "What to do with annotations that cannot be right: refuse or leave_out.")
    max_train_samples: int | None = _field(None, "Learn from so many pictures only.")
    max_eval_samples: int | None = _field(None, "Evaluate with so many pictures only.")
    check_images: int = _field(1000, "Pictures of each split that are decoded before training, to find bad ones.")

    image_mean: list[float] = _field([], "Mean of each channel, in [0, 1]; the model's or ImageNet's if not given.")
    image_std: list[float] = _field([], "Deviation of each channel; the model's or ImageNet's if not given.")
    crop_size: int = _field(1024, "Side in px of the square that large-scale jitter makes to learn from.")
    jitter_scale: list[float] = _field([0.1, 2.0], "Smallest and largest scale, relative to what fits the square.")
    flip_probability: float = _field(0.5, "Of a horizontal flip.")
    eval_min_size: int = _field(800, "Shorter side in px that pictures to evaluate with are resized to.")
    eval_max_size: int = _field(1333, "Longest side in px that they may then have.")
    num_workers: int = _field(4, "Processes that read and decode, for each training process.")

    epochs: float = _field(36, "Length of the training.")
    warmup_steps: int = _field(500, "Steps until the highest learning rate is reached.")
    decay_epochs: list[float] = _field([27, 33], "Epochs after which the learning rate falls.")
    decay_factor: float = _field(0.1, "What it falls to each time, of what it was.")
    max_steps: int | None = _field(None, "Stop after so many steps; the schedule stays that of all epochs.")
    batch_size: int = _field(2, "Pictures per process and forward pass.")
    effective_batch_size: int = _field(16, "Pictures per optimizer step, over all processes; reached by accumulation.")
    eval_batch_size: int = _field(1, "Pictures per process in evaluations.")
    learning_rate: float = _field(1e-4, "Highest learning rate, whatever the number of pictures per step.")
    weight_decay: float = _field(0.05, "Of the matrices; vectors, the position embedding and tables are not decayed.")
    adam_betas: list[float] = _field([0.9, 0.999], "Both betas of AdamW.")
    layer_decay: float = _field(1.0, "Factor of the learning rate from one layer of the main stage to the one below.")
    clip_norm: float | None = _field(None, "Largest norm of the gradient; unlimited if not given.")
    ema_decay: float | None = _field(None, "Decay of a moving average of the weights, which is then what is kept.")
    evaluate_every_steps: int | None = _field(None, "Steps between evaluations and checkpoints; an epoch otherwise.")
    mixed_precision: str = _field("bf16", "bf16, fp16 (with a gradient scaler) or no.")
    gradient_checkpointing: bool = _field(False, "Compute activations again in the backward pass, to save memory.")
    seed: int = _field(0, "Of everything random.")

    output_dir: str | None = _field(None, "Where checkpoints, logs, figures, pictures and the model go.")
    resume: str | None = _field(None, "'latest', or the folder of a checkpoint to go on from.")
    keep_last: int = _field(2, "Checkpoints that are kept.")
    log_every_steps: int = _field(20, "Steps between two lines of the log.")
    num_pictures: int = _field(4, "Pictures of the evaluation that are drawn with what is found on them; 0 for none.")
    picture_threshold: float = _field(0.5, "Lowest score of what is drawn.")
    tracker: str = _field("tensorboard", "tensorboard, wandb or none.")
    show_layer_table: bool = _field(False, "Print ids, learning rates and decay of the parameters, and stop.")

    # what `FinetuneRun` asks for and a detector has not
    count_stem = False  # the numbering of dense work
    compile = False  # proposals have a new shape in every step
    early_stopping_patience = lora_rank = hub_model_id = None
    push_to_hub = hub_private_repo = False

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
        """
        Everything that can be known before anything is read.

        Raises:
            ValueError: what does not fit, what was given, and what would do.
        """
        self._check_choices()
        self._check_ranges()
        self.model_changes()
        self.head_changes()
        self.accumulation_steps(1)

    def _check_choices(self):
        for name in ("train_annotations", "eval_annotations"):
            if not getattr(self, name):
                raise ValueError(
                    f"There is nothing to {name.split('_')[0]} with: give --{name}, a file of COCO's format."
                )
        if not self.output_dir and not self.show_layer_table:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if bool(self.model_name_or_path) == self.from_scratch:
            raise ValueError("Give either --model_name_or_path, or --from_scratch with --architecture.")
        if self.from_scratch and not self.architecture:
            raise ValueError(f"--from_scratch needs --architecture: one of {', '.join(ARCHITECTURES)}.")
        if self.architecture is not None and self.architecture not in ARCHITECTURES:
            raise ValueError(f"There is no architecture {self.architecture!r}. Choose from {', '.join(ARCHITECTURES)}.")
        choices = {"mixed_precision": ("bf16", "fp16", "no"), "tracker": ("tensorboard", "wandb", "none")}
        for name, allowed in (choices | {"detector": DETECTORS, "bad_annotations": ("refuse", "leave_out")}).items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if "drop_path_rate" in self.model_changes():
            raise ValueError("--model sets drop_path_rate, which has a flag of its own: use that.")
        own = {"min_size": "eval_min_size", "max_size": "eval_max_size", "predicts_masks": "detector"}
        own |= {"image_mean": "image_mean", "image_std": "image_std", "backbone_config": "model"}
        for name in sorted(set(self.head_changes()) & set(own)):
            raise ValueError(f"--head sets {name}, which has a flag of its own: use --{own[name]}.")

    def _check_ranges(self):
        positive = ["crop_size", "eval_min_size", "eval_max_size", "epochs", "batch_size", "effective_batch_size"]
        positive += ["eval_batch_size", "learning_rate", "decay_factor", "keep_last", "log_every_steps"]
        optional = ["max_train_samples", "max_eval_samples", "max_steps", "clip_norm", "evaluate_every_steps"]
        for name in positive + [name for name in optional if getattr(self, name) is not None]:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("num_workers", "weight_decay", "check_images", "warmup_steps", "num_pictures"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("flip_probability", "picture_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}. Published: 0.9 for base.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must be two numbers in [0, 1), got {self.adam_betas}. Published: 0.9 0.999.")
        if len(self.jitter_scale) != 2 or not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ValueError(f"jitter_scale must be two positive numbers such as 0.1 2.0, got {self.jitter_scale}.")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"image_std must be positive, got {self.image_std}.")
        if self.eval_min_size > self.eval_max_size:
            raise ValueError(f"eval_min_size {self.eval_min_size} must not exceed eval_max_size {self.eval_max_size}.")
        if sorted(self.decay_epochs) != self.decay_epochs or not all(0 < e < self.epochs for e in self.decay_epochs):
            raise ValueError(
                f"decay_epochs must be ascending and within the {self.epochs} epochs, got {self.decay_epochs}. "
                "Published: 27 33 of 36."
            )

    def identity(self) -> dict:
        """The numbers that a resumption must share with its run."""
        own = {"num_pictures", "picture_threshold"}
        return {name: value for name, value in asdict(self).items() if name not in RUNTIME | own}
