# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What all tasks share of a training with `transformers.Trainer`."""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import datasets
import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from ..data.datasets import ImageDataset
from ..modeling_hivit import HiViTForImageClassification
from .optim import cosine_learning_rate, parameter_groups
from .recipe_old import Recipe, one_sentence, parse_recipe


AVERAGE = "average.safetensors"  # beside the weights of a checkpoint, if a moving average is kept
FIGURES = ("eval_results.json", "all_results.json", "trainer_state.json")  # as `Trainer` names them


class _Following(TrainerCallback):
    """Tells the images which epoch it is, and the moving average that a step was taken."""

    def __init__(self, images: ImageDataset):
        self.images, self.trainer = images, None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.images.epoch = int(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)


def training_arguments(recipe: Recipe, best: str, greater_is_better: bool, **length: float) -> TrainingArguments:
    """
    What `Trainer` wants to know, from a recipe.

    Args:
        recipe: of a fine-tuning of any kind.
        best: the metric that the best model is chosen by, if training stops early.
        greater_is_better: whether it grows.
        length: `num_train_epochs` or `max_steps`.
    """
    strategy = "epoch" if recipe.evaluate_every_steps is None else "steps"
    early = recipe.early_stopping_patience is not None
    return TrainingArguments(
        output_dir=recipe.output_dir,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size,
        max_grad_norm=recipe.clip_norm or 0.0,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=recipe.evaluate_every_steps,
        save_steps=recipe.evaluate_every_steps or 500,
        save_total_limit=recipe.keep_last,
        load_best_model_at_end=early,
        metric_for_best_model=best,
        greater_is_better=greater_is_better,
        logging_steps=recipe.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a loss that is not finite
        report_to=recipe.tracker,
        bf16=recipe.mixed_precision == "bf16",
        fp16=recipe.mixed_precision == "fp16",
        torch_compile=recipe.compile,
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.accelerator.is_available(),
        use_cpu=not torch.accelerator.is_available(),  # without it, no bfloat16 there
        remove_unused_columns=False,
        label_names=["labels"],
        restore_callback_states_from_checkpoint=True,
        push_to_hub=recipe.push_to_hub,
        hub_model_id=recipe.hub_model_id,
        hub_private_repo=recipe.hub_private_repo or None,
        hub_strategy="end",
        seed=recipe.seed,
        data_seed=recipe.seed,
        **length,
    )


def run_recipe(recipe_class: type[Recipe], run_class: type, description: str, argv: list[str] | None = None) -> int:
    """
    What an example does: parses its command line into a recipe, makes the run, and trains.

    Args:
        recipe_class: of the recipe.
        run_class: `FinetuneRun`, or one like it.
        description: for `--help`.
        argv: the command line, that of the process if not given.

    Returns:
        The exit code: 0, or 2 after a sentence about what does not fit.
    """
    recipe = parse_recipe(recipe_class, description, argv)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    state = PartialState(cpu=not torch.accelerator.is_available())  # else each process on CPUs would train alone
    try:
        run = run_class(recipe, say=state.print)
        if recipe.show_layer_table:
            state.print(run.layer_table())
            return 0
        state.print(f"processes: {state.num_processes}, parameters: {run.model.num_parameters():,}")
        run.train()
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        print(f"error: {one_sentence(error)}", file=sys.stderr, flush=True)
        if state.num_processes > 1:
            os._exit(2)  # the others may wait for this process in a collective; the launcher stops them
        return 2
    return 0


class _FiniteLoss(TrainerCallback):
    """Stops a run whose loss is not finite."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(_not_finite(logs["loss"], state.global_step))


def _not_finite(loss: float, step: int) -> str:
    hints = "Lower the learning rate, lengthen the warm-up, or check the images for NaN."
    return f"The loss is {loss} in step {step}. {hints}"


@dataclass
class FinetuneSettings:
    """
    One fine-tuning run.

    Args:
        total_steps: optimizer steps.
        warmup_steps: steps until the highest learning rate is reached.
        batch_size: images per device and step.
        learning_rate: the highest one, for the batch size at hand; nothing is scaled.
        weight_decay: of the matrices; vectors are not decayed.
        eval_every_steps: steps between two evaluations. There always is one after the last step.
        eval_batch_size: images per device in an evaluation.
        seed: of the order of the images, and of all other randomness while training.
    """

    total_steps: int
    warmup_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    eval_every_steps: int
    eval_batch_size: int
    seed: int

    def check(self):
        """Raises ValueError for numbers that nothing can be learned with."""
        for name in ["total_steps", "batch_size", "eval_every_steps", "eval_batch_size"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}. Try 1e-3.")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps must be at least 0 and less than total_steps {self.total_steps}, "
                f"got {self.warmup_steps}."
            )


@dataclass
class FinetuneResult:
    """What a run gave: a record per evaluation (`step` and the metrics), the last one's metrics, and the time."""

    history: list[dict]
    metrics: dict[str, float]
    seconds: float


def finetune(
    model: HiViTForImageClassification,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    settings: FinetuneSettings,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    data_collator: Callable | None = None,
    description: str = "fine-tuning",
    show_progress: bool = True,
) -> FinetuneResult:
    """
    Trains a classifier in place with AdamW (betas 0.9 and 0.999), warm-up and cosine, and evaluates it on the way.

    Args:
        model: trained in place.
        train_dataset: items with `pixel_values` and `labels`.
        eval_dataset: the same, for the evaluations. Nothing is chosen by them: the model is that of the last step.
        settings: the numbers of the run.
        compute_metrics: from logits and labels to named numbers, as in `Trainer`.
        data_collator: makes a batch of items; `Trainer`'s default if not given.
        description: what the progress bar says.
        show_progress: whether there is one; turn it off where several runs share a terminal.

    Raises:
        ValueError: for impossible settings and empty datasets, before the first step.
        FloatingPointError: if the training loss is not finite.
    """
    settings.check()
    for name, dataset in [("train_dataset", train_dataset), ("eval_dataset", eval_dataset)]:
        if len(dataset) == 0:
            raise ValueError(f"{name} is empty: give at least one image with its label.")
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.999)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_learning_rate(step, settings.total_steps, settings.warmup_steps, base=1.0)
    )
    progress = _Progress(description, settings.batch_size, show_progress)
    start = time.perf_counter()
    with TemporaryDirectory() as folder:  # Trainer wants one, though nothing is saved
        trainer = Trainer(
            model=model,
            args=_training_arguments(settings, folder),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            optimizers=(optimizer, schedule),
            callbacks=[progress],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            progress.close()
    seconds = time.perf_counter() - start
    model.eval()
    vars(model.config).pop("use_cache", None)  # Trainer sets it, and it would be saved; HiViT has no cache
    history = [_evaluation(record) for record in trainer.state.log_history if "eval_loss" in record]
    return FinetuneResult(history, {key: value for key, value in history[-1].items() if key != "step"}, seconds)


def _training_arguments(settings: FinetuneSettings, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=settings.total_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        eval_strategy="steps",
        eval_steps=settings.eval_every_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide what _Progress shall find
        max_grad_norm=0.0,
        save_strategy="no",
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        seed=settings.seed,
        data_seed=settings.seed,
    )


def _evaluation(record: dict) -> dict:
    """A record of Trainer's log without the prefix, and without the timings, which differ from run to run."""
    names = {key: key.removeprefix("eval_") for key in record if key.startswith("eval_")}
    timings = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    return {"step": record["step"]} | {names[key]: record[key] for key in names if key not in timings}


class _Progress(TrainerCallback):
    """One progress bar instead of Trainer's printed logs; also stops a run whose loss is not finite."""

    def __init__(self, description: str, batch_size: int, show: bool):
        self.description, self.batch_size, self.show = description, batch_size, show
        self.bar = None
        self.training_seconds = 0.0  # without evaluations

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        hidden = not (self.show and state.is_world_process_zero)
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", disable=hidden)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.step_start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.training_seconds += time.perf_counter() - self.step_start

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs):
        if "loss" not in logs:  # an evaluation, or the summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(_not_finite(logs["loss"], state.global_step))
        speed = state.global_step * self.batch_size * args.world_size / self.training_seconds
        self.bar.set_postfix(
            {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.2e}", "img/s": f"{speed:.0f}"},
            refresh=False,
        )
        self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()
