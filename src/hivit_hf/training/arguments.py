# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Arguments that all tasks share: which weights, which images, and `TrainingArguments` with what the recipes need."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from tempfile import gettempdir
from typing import Annotated, Any, ClassVar

import torch
from transformers import TrainingArguments

from ..configuration_hivit import ARCHITECTURES, HiViTConfig
from .command_line import (
    CHANGES_RECIPE,
    CHANGES_TOPOLOGY,
    MAY_CHANGE,
    all_finite,
    all_positive,
    annotations_of,
    argument,
    at_most,
    check_fields,
    decay_rate,
    fraction,
    json_object,
    nonnegative,
    one_of,
    one_sentence,
    positive,
    proper_fraction,
    within,
)


MAX_WORKERS = 256  # per process; each takes memory and seconds to start
MAX_BATCH_SIZE = 2**20


@dataclass
class NetworkArguments:
    """The network of a training."""

    _argument_group_name = "model"

    architecture: Annotated[str | None, one_of(*ARCHITECTURES)] = argument(
        None, f"Architecture of the network: {', '.join(ARCHITECTURES)}. A model of another one is refused."
    )
    config_overrides: Annotated[str, json_object] = argument(
        "{}", "Changes of the configuration as JSON, for example '{\"window_size\": 14}'."
    )
    drop_path_rate: Annotated[float, decay_rate] = argument(0.0, "Stochastic depth rate of the last layer.")

    FLAGS_OF_THEIR_OWN: ClassVar[tuple[str, ...]] = ("drop_path_rate",)  # which --config_overrides must not set

    def __post_init__(self):
        check_fields(self)
        for name, value in self.overrides().items():
            _check_type(name, value)
        twice = sorted(set(self.overrides()) & set(self.FLAGS_OF_THEIR_OWN))
        if twice:
            raise ValueError(f"--config_overrides sets {', '.join(twice)}, which have flags of their own: use those.")

    def overrides(self) -> dict:
        """`config_overrides` as a dictionary."""
        return json.loads(self.config_overrides)


def _check_type(name: str, value: Any):
    """ValueError if no HiViT has such a value; what depends on the others is checked with them."""
    try:
        HiViTConfig(**{name: value})
    except ValueError:
        pass
    except Exception as error:  # transformers' and ours, of a type that they did not expect
        raise ValueError(f"--config_overrides sets {name} to what it cannot be: {one_sentence(error)}") from error


@dataclass
class ModelArguments(NetworkArguments):
    """Which weights a training begins with."""

    model_name_or_path: str | None = argument(None, "Folder or Hub name of the model to begin with.")
    from_scratch: bool = argument(False, "Begin with random weights of --architecture.")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.model_name_or_path) == self.from_scratch:
            raise ValueError("Give either --model_name_or_path, or --from_scratch with --architecture.")
        if self.from_scratch and not self.architecture:
            raise ValueError(f"--from_scratch needs --architecture: one of {', '.join(ARCHITECTURES)}.")


@dataclass
class ImageArguments:
    """What becomes of the images of a training."""

    _argument_group_name = "data"

    max_train_samples: Annotated[int | None, positive] = argument(None, "Number of training images, drawn at random.")
    max_eval_samples: Annotated[int | None, positive] = argument(None, "Number of validation images, drawn at random.")
    check_images: Annotated[int, nonnegative, MAY_CHANGE] = argument(
        1000, "Number of images of each split that are decoded before training, to find unreadable ones."
    )
    image_mean: Annotated[list[float], all_finite] = argument(
        [], "Mean of each channel, in [0, 1] (the model's, or ImageNet's)."
    )
    image_std: Annotated[list[float], all_positive] = argument(
        [], "Standard deviation of each channel (the model's, or ImageNet's)."
    )
    flip_probability: Annotated[float, fraction] = argument(0.5, "Probability of a horizontal flip.")

    def __post_init__(self):
        check_fields(self)


@dataclass
class DatasetLocation:
    """Where images are: a dataset of the `datasets` library, or folders."""

    _argument_group_name = "data"

    dataset_name: str | None = argument(
        None, "Dataset of the Hub, folder of images or Parquet files, or dataset saved with `save_to_disk`."
    )
    dataset_config_name: str | None = argument(None, "Configuration of the Hub dataset.")
    dataset_revision: str | None = argument(None, "Commit, branch or tag of the Hub dataset.")
    train_dir: str | None = argument(None, "Folder of training images, instead of --dataset_name.")
    validation_dir: str | None = argument(None, "Folder of validation images, beside --train_dir.")

    def __post_init__(self):
        check_fields(self)
        if bool(self.dataset_name) == bool(self.train_dir or self.validation_dir):
            raise ValueError("There is no data: give either --dataset_name, or --train_dir.")

    def location(self) -> dict[str, str | None]:
        """Where the data is, as keywords of `data.datasets.open_splits`."""
        return {item.name: getattr(self, item.name) for item in fields(DatasetLocation)}


@dataclass
class DatasetSplits(DatasetLocation):
    """As `DatasetLocation`, and the splits to train and to evaluate on."""

    train_split_name: str = argument("train", "Split to train on.")
    eval_split_name: str | None = argument(None, "Split to evaluate on ('validation', 'val' or 'test').")
    train_val_split: Annotated[float | None, proper_fraction] = argument(
        None, "Fraction of the training split that is held out for validation."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("eval_split_name", "validation_dir"):
            if getattr(self, name) and self.train_val_split:
                raise ValueError(f"Give --{name} or --train_val_split, not both.")


@dataclass
class DataArguments(DatasetSplits, ImageArguments):
    """Where images and labels come from, and what becomes of the images of a training."""

    class_names: list[str] = argument([], "Names of the classes, in the order of their numbers.")


# Fields of transformers' `TrainingArguments` on which the numbers of a training depend; a resumption must share them.
NUMBERS = {"per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "weight_decay"}
NUMBERS |= {"adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs"}
NUMBERS |= {"warmup_steps", "bf16", "fp16", "optim", "optim_args", "label_smoothing_factor", "seed", "data_seed"}

# Fields of `TrainingArguments` that would break a promise, or do nothing here: why they are refused.
_SHARDED = "training is data-parallel (torchrun), which networks of 300 million parameters fit"
_ORDER = "the order of the images depends on the seed alone"
_TOKENS = "images have no tokens to count"
_ALL_PREDICTIONS = "the metrics are computed from all predictions at once"
_ROUNDED = "the weights that are saved would be rounded too; --bf16 evaluates in bfloat16"
_LANGUAGE = "it is for language models"
REFUSED = {
    "do_eval": "a training ends with an evaluation; --eval_strategy no leaves out those before",
    "do_predict": "there is no test set: evaluate with --do_train false --eval_split_name test",
    # data
    "remove_unused_columns": "it would remove the images",
    "label_names": "batches have their labels under 'labels'; --class_names names the classes",
    "dataloader_drop_last": "training takes whole batches already, and evaluations need all images",
    "dataloader_persistent_workers": "workers that outlive an epoch would augment all epochs alike",
    "dataloader_in_order": _ORDER,
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "accelerator_config": "it would change the batches that a step takes; the flags say what is needed",
    # optimization
    "optim_target_modules": "it is for optimizers that group the parameters by themselves, without layer_decay",
    "average_tokens_across_devices": _TOKENS,
    "include_num_input_tokens_seen": _TOKENS,
    "neftune_noise_alpha": "it is noise for word embeddings",
    "use_liger_kernel": _LANGUAGE,
    "liger_kernel_config": _LANGUAGE,
    "use_cache": _LANGUAGE,
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "deepspeed": _SHARDED,
    "parallelism_config": _SHARDED,
    # evaluation
    "prediction_loss_only": _ALL_PREDICTIONS,
    "batch_eval_metrics": _ALL_PREDICTIONS,
    "eval_do_concat_batches": _ALL_PREDICTIONS,
    "eval_use_gather_object": "predictions are tensors",
    "include_for_metrics": "no metric uses more than predictions and labels",
    "bf16_full_eval": _ROUNDED,
    "fp16_full_eval": _ROUNDED,
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    # checkpoints
    "save_only_model": "a resumption needs the optimizer",
    "ignore_data_skip": "a resumption would train on other images",
    "restore_callback_states_from_checkpoint": "early stopping would count from zero again after a resumption",
    "enable_jit_checkpoint": "it saves within a step, so that a resumption would differ from the run",
}


@dataclass
class RecipeArguments:
    """What the published recipes need, of pre-training and of `Trainer`'s tasks."""

    _argument_group_name = "training"

    max_steps: int = argument(-1, "Number of optimizer steps, instead of --num_train_epochs, if positive.")
    stop_after_steps: Annotated[int | None, positive, MAY_CHANGE] = argument(
        None, "Save and stop after this optimizer step; the schedule remains that of the whole training."
    )
    effective_batch_size: Annotated[int | None, positive, at_most(MAX_BATCH_SIZE)] = argument(
        None, "Number of images per optimizer step over all devices; --gradient_accumulation_steps follows from it."
    )
    learning_rate: Annotated[float | None, positive, CHANGES_RECIPE] = argument(
        None, "Peak learning rate (--base_learning_rate times the images per step / 256)."
    )
    base_learning_rate: Annotated[float | None, positive] = argument(
        5e-4, "Peak learning rate for 256 images per step."
    )
    adam_beta1: Annotated[float, decay_rate] = argument(0.9, "First beta of AdamW.")
    max_grad_norm: Annotated[float, nonnegative, CHANGES_RECIPE] = argument(
        0.0, "Maximum norm of the gradient; 0 for no clipping."
    )
    gradient_checkpointing: bool = argument(False, "Recompute activations in the backward pass, to save memory.")
    dataloader_num_workers: Annotated[int, nonnegative, at_most(MAX_WORKERS), CHANGES_TOPOLOGY] = argument(
        4, "Number of data loading workers per process."
    )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warmup."""
        return self.learning_rate or self.base_learning_rate * self.effective_batch_size / 256

    def accumulation_steps(self, batch_size: int, num_processes: int) -> int:
        """Forward passes per optimizer step. Raises ValueError if they do not come out even."""
        together = batch_size * num_processes
        if self.effective_batch_size % together:
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} is no multiple of {batch_size} images on "
                f"{num_processes} processes: choose per_device_train_batch_size so that it is."
            )
        return self.effective_batch_size // together


@dataclass
class HiViTTrainingArguments(RecipeArguments, TrainingArguments):
    """
    `TrainingArguments` with what the published recipes need: layer-wise learning rate decay, a moving average of the
    weights, learning rates for 256 images, and a number of images per optimizer step that holds on any number of
    devices.

    Raises:
        ValueError: for values that do not fit, and for arguments that would break a promise (`REFUSED`).
    """

    output_dir: str | None = argument(None, "Folder for checkpoints, the log, metrics and the model.")
    do_train: Annotated[bool, MAY_CHANGE] = argument(True, "Train; if not, only evaluate --model_name_or_path.")
    do_eval: bool = argument(True, "Evaluate after training.")
    per_device_train_batch_size: Annotated[int, positive] = argument(32, "Training batch size per device.")
    per_device_eval_batch_size: Annotated[int, positive, MAY_CHANGE] = argument(64, "Evaluation batch size per device.")
    num_train_epochs: Annotated[float, positive] = argument(20, "Number of training epochs.")
    weight_decay: Annotated[float, nonnegative] = argument(
        0.05, "Weight decay of matrices; vectors, position embeddings and relative position biases have none."
    )
    adam_beta2: Annotated[float, decay_rate] = argument(0.999, "Second beta of AdamW.")
    layer_decay: Annotated[float, within(0, 1, low_included=False)] = argument(
        1.0, "Factor of the learning rate from one layer to the one below."
    )
    ema_decay: Annotated[float | None, proper_fraction] = argument(
        None, "Decay of a moving average of the weights, which is then evaluated and saved."
    )
    early_stopping_patience: Annotated[int | None, positive] = argument(
        None, "Number of evaluations without improvement before training stops."
    )
    metric_for_best_model: str | None = argument(None, "Metric by which a checkpoint is the best (the task's).")
    optim: str = argument("adamw_torch", "Optimizer, any of transformers'.")
    bf16: bool = argument(False, "Mixed precision in bfloat16.")

    eval_strategy: str = argument("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = argument("epoch", "When to save: no, steps, epoch or best.")
    save_total_limit: Annotated[int | None, positive, MAY_CHANGE] = argument(2, "Number of checkpoints to keep.")
    logging_steps: Annotated[float, positive] = argument(20, "Number of steps between two lines of the log.")
    logging_first_step: bool = argument(True, "Log the first step.")
    logging_nan_inf_filter: bool = argument(False, "Refused.")
    include_num_input_tokens_seen: bool = argument(False, "Refused.")
    report_to: list[str] | None = argument(["tensorboard"], "Trackers: tensorboard, wandb, none, ...")
    remove_unused_columns: bool = argument(False, "Refused.")
    restore_callback_states_from_checkpoint: bool = argument(True, "Refused.")
    label_names: list[str] | None = argument(["labels"], "Refused.")
    hub_strategy: str = argument("end", "When to upload: end, every_save, checkpoint or all_checkpoints.")
    hub_private_repo: bool | None = argument(False, "Make a new repository private.")
    resume_from_checkpoint: str | None = argument(None, "Folder of a checkpoint to resume from, or 'latest'.")
    show_layer_table: Annotated[bool, MAY_CHANGE] = argument(
        False, "Print layer ids, learning rates and weight decay of the parameters, and stop."
    )

    REFUSED: ClassVar[dict[str, str]] = REFUSED
    count_early_layers: ClassVar[bool] = False  # the layer numbering of dense tasks, see `optim.layer_id`

    def __post_init__(self):
        if not self.output_dir and not self.show_layer_table:
            raise ValueError("There is nowhere to write: give --output_dir.")
        if self.show_layer_table:
            self.output_dir = gettempdir()  # nothing is written, but Trainer makes the folder
        for item in fields(self):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if item.name in self.REFUSED and getattr(self, item.name) != default:
                raise ValueError(f"--{item.name} is refused: {self.REFUSED[item.name]}.")
        check_fields(self)
        self._check_strategies()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, transformers refuses bfloat16 there
        if hasattr(self, "activation_checkpointing"):  # its name of tomorrow, which saves a warning
            self.activation_checkpointing = bool(self.gradient_checkpointing or self.activation_checkpointing)
        if self.data_seed is None:
            self.data_seed = self.seed
        self.hub_private_repo = self.hub_private_repo or None
        if not self.do_train:
            self.report_to = "none"  # a single evaluation has no curve, and TensorBoard would write to ./runs
        best = self.metric_for_best_model
        super().__post_init__()
        if best is None and self.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy"):
            self.metric_for_best_model = self.greater_is_better = None  # the task's; transformers says loss
        if (self.hub_model_id or self.hub_private_repo) and not self.push_to_hub:
            raise ValueError("--hub_model_id and --hub_private_repo are for --push_to_hub: give it too.")
        if not self.do_train and (self.resume_from_checkpoint or self.push_to_hub):
            raise ValueError("--do_train false trains no model: leave out --resume_from_checkpoint and --push_to_hub.")
        self._set_batch_and_learning_rate()

    def _check_strategies(self):
        if self.logging_strategy == "no":
            raise ValueError("--logging_strategy no is refused: a loss that is not finite would remain unnoticed.")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ValueError(
                f"eval_steps has no effect with eval_strategy {self.eval_strategy}: give --eval_strategy steps."
            )
        if self.save_steps != 500 and self.save_strategy != "steps":
            raise ValueError(
                f"save_steps has no effect with save_strategy {self.save_strategy}: give --save_strategy steps."
            )
        if self.early_stopping_patience is not None:
            self.load_best_model_at_end = True
        best = self.load_best_model_at_end or self.save_strategy == "best"
        saved_alike = self.save_strategy in (self.eval_strategy, "best")
        if best and (self.eval_strategy == "no" or not saved_alike):
            raise ValueError(
                f"The best checkpoint is one that was evaluated, but eval_strategy is {self.eval_strategy} and "
                f"save_strategy {self.save_strategy}: give both the same (with --eval_steps N --save_steps N)."
            )

    def _set_batch_and_learning_rate(self):
        together = self.per_device_train_batch_size * self.world_size
        if self.effective_batch_size is None:
            self.effective_batch_size = together * self.gradient_accumulation_steps
        steps = self.accumulation_steps(self.per_device_train_batch_size, self.world_size)
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"effective_batch_size {self.effective_batch_size} takes {steps} batches of {together} images, but "
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}: leave one of them out."
            )
        self.gradient_accumulation_steps = steps
        self.learning_rate = self.peak_learning_rate


def identity(*arguments: Any) -> dict:
    """
    The values that a resumption must share with its run, by name.

    Args:
        arguments: dataclasses of arguments.
    """
    found = {}
    base = {item.name for item in fields(TrainingArguments)}
    for part in arguments:
        annotated, values = annotations_of(part), asdict(part)
        for name, value in values.items():
            own = name not in base or not isinstance(part, TrainingArguments)
            if (own or name in NUMBERS) and MAY_CHANGE not in annotated[name]:
                found[name] = getattr(value, "value", value)  # of enumerations
    return found
