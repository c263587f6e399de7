# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training of classifiers with `transformers.Trainer`: from a recipe, or from a few numbers."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..hub import evaluation_processor
from ..modeling_hivit import HiViTForImageClassification
from .classifier import Start, add_lora, load_classifier, random_classifier
from .finetune_recipe import FinetuneRecipe
from .labelled import (
    SINGLE,
    Batches,
    Evaluating,
    LabelledPictures,
    Labels,
    check_pictures,
    check_same_labels,
    find_labels,
    open_splits,
    picture_column,
    train_and_eval,
    training_transform,
)
from .metrics import metrics_of
from .optim import cosine_learning_rate, layer_table, layerwise_parameter_groups, parameter_groups
from .recipe import Recipe, one_sentence, parse_recipe


AVERAGE = "average.safetensors"  # beside the weights of a checkpoint, if a moving average is kept
FIGURES = ("eval_results.json", "all_results.json", "trainer_state.json")  # as `Trainer` names them


class ClassifierTrainer(Trainer):
    """
    `Trainer` with the published recipe: layer-wise decay, its schedule, mixed and smoothed targets, moving average.

    Args:
        recipe: the numbers.
        config: of the HiViT, which `model` may wrap.
        keywords: of `Trainer`.
    """

    def __init__(self, recipe: FinetuneRecipe, config, **keywords):
        self.recipe, self.hivit_config = recipe, config
        self.average: AveragedModel | None = None
        super().__init__(**keywords)
        self.loss_is_scaled_for_ga = False  # the losses are means

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """
        Whole batches only, as in the original; the last step of an epoch may add up fewer of them.
        `Trainer` has one switch for this and evaluations, which need all.
        """
        self.args.dataloader_drop_last = True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over `layerwise_parameter_groups`."""
        if self.optimizer is None:
            recipe, model = self.recipe, self.model if model is None else model
            groups = layerwise_parameter_groups(
                model,
                self.hivit_config,
                recipe.weight_decay,
                recipe.learning_rate,
                recipe.layer_decay,
                recipe.count_stem,
            )
            groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
            self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=tuple(recipe.adam_betas))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of all epochs, also where `max_steps` ends the training earlier."""
        if self.lr_scheduler is None:
            recipe, args = self.recipe, self.args
            per_epoch = -(-len(self.get_train_dataloader()) // args.gradient_accumulation_steps)
            total = max(1, math.ceil(recipe.epochs * per_epoch))
            warmup = min(recipe.warmup_epochs * per_epoch, total - 1)
            rates = (recipe.learning_rate, recipe.min_learning_rate, recipe.warmup_learning_rate)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: cosine_learning_rate(min(step, total), total, warmup, *rates) / recipe.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy against class numbers or probabilities; other problems leave the loss to the model."""
        if self.hivit_config.problem_type != SINGLE or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    # -- the moving average, which is what is evaluated and kept; the weights themselves go on being trained

    def start_average(self, checkpoint: str | None):
        """Begins the moving average, where the training begins or where a checkpoint left it."""
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.recipe.ema_decay))
        if checkpoint is not None:
            self.average.load_state_dict(load_file(Path(checkpoint) / AVERAGE))
        self.average.to(self.args.device)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        pairs = list(zip(self.model.parameters(), self.average.module.parameters())) if self.average else []
        for weights, averaged in pairs:
            weights.data, averaged.data = averaged.data, weights.data
        try:
            yield
        finally:
            for weights, averaged in pairs:
                weights.data, averaged.data = averaged.data, weights.data

    def evaluate(self, *arguments, **keywords) -> dict[str, float]:
        with self.averaged_weights():
            return super().evaluate(*arguments, **keywords)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        if self.average is not None and self.args.should_save:
            weights = {name: tensor.contiguous() for name, tensor in self.average.state_dict().items()}
            save_file(weights, Path(output_dir or self.args.output_dir) / AVERAGE)

    def _load_best_model(self):
        super()._load_best_model()
        if self.average is not None:
            self.average.load_state_dict(load_file(Path(self.state.best_model_checkpoint) / AVERAGE))

    def keep_average(self):
        """Ends the moving average: the model has its weights from now on."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None


class _Following(TrainerCallback):
    """Tells the pictures which epoch it is, and the moving average that a step was taken."""

    def __init__(self, pictures: LabelledPictures):
        self.pictures, self.trainer = pictures, None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.pictures.epoch = int(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)


class FinetuneRun:
    """
    Everything of one training, made from a recipe; `train` does it.

    Args:
        recipe: the numbers, checked.
        say: takes a sentence for the user.

    Raises:
        ValueError: for an output folder that holds another run, and for data, labels and weights that do not fit the
            recipe or each other.
    """

    def __init__(self, recipe: FinetuneRecipe, say: Callable[[str], None] = print):
        set_seed(recipe.seed)
        self.recipe, self.say = recipe, say
        if recipe.resume is None and not recipe.show_layer_table:
            self._refuse_used_folder()
        self._prepare()

    def _refuse_used_folder(self):
        """ValueError for an output folder with a run or its figures: those of two must not mix."""
        output = Path(self.recipe.output_dir)
        names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
        latest = get_last_checkpoint(str(output)) if names else None
        if latest is not None and not self.recipe.evaluate_only:
            raise ValueError(
                f"{output} holds a run, at {Path(latest).name}: give --resume latest, or another --output_dir."
            )
        for name in names:
            if name in FIGURES or name.startswith("checkpoint-"):
                raise ValueError(f"{output} holds {name} of another run: give another --output_dir.")

    def _prepare(self):
        """Reads what the run needs."""
        recipe = self.recipe
        splits = open_splits(recipe.dataset_name, recipe.dataset_config, recipe.dataset_revision)
        self._build(*self._choose(splits))

    def _choose(self, splits: datasets.DatasetDict) -> tuple[datasets.Dataset, datasets.Dataset]:
        """What is learnt from, and what is evaluated with."""
        recipe = self.recipe
        return train_and_eval(splits, recipe.train_split, recipe.eval_split, recipe.eval_fraction, recipe.seed)

    def _build(self, train, evaluation):
        """Everything that depends on what is learnt."""
        recipe = self.recipe
        column = picture_column(train, recipe.image_column)
        picture_column(evaluation, column)
        self.labels = find_labels(train, recipe.problem_type, recipe.label_column, recipe.label_names)
        targets = [self.labels.targets(split, name) for split, name in ((train, "train"), (evaluation, "eval"))]
        check_same_labels(train, evaluation, self.labels, targets)
        self.start = _start(recipe, self.labels)
        for note in self.start.notes:
            self.say(note)
        self.model = self.start.model
        self.config = self.model.config
        self._make_pictures(train, evaluation, targets, column)
        if recipe.lora_rank is not None:
            self.model = add_lora(self.model, recipe.lora_rank)

    def _make_pictures(self, train, evaluation, targets, column):
        recipe, config = self.recipe, self.config
        if not isinstance(config.image_size, int):
            raise ValueError(f"The network sees {config.image_size} px: give one --image_size for square pictures.")
        mean, std = recipe.image_mean or self.start.mean, recipe.image_std or self.start.std
        if not len(mean) == len(std) == config.num_channels:
            raise ValueError(f"image_mean and image_std need {config.num_channels} numbers, got {mean} and {std}.")
        self.processor = evaluation_processor(config.image_size, mean, std, recipe.crop_pct)
        transform = training_transform(
            config.image_size,
            mean,
            std,
            recipe.crop_scale,
            recipe.flip_probability,
            recipe.auto_augment,
            recipe.color_jitter,
            recipe.random_erasing,
        )
        limits = (recipe.max_train_samples, recipe.max_eval_samples)
        rows = [_sample(len(split), limit, recipe.seed) for split, limit in zip((train, evaluation), limits)]
        train, evaluation = train.select(rows[0]), evaluation.select(rows[1])
        targets = [target[torch.tensor(row)] for target, row in zip(targets, rows)]
        channels = config.num_channels
        self.train_pictures = LabelledPictures(train, column, transform, targets[0], channels, recipe.seed, "train")
        self.eval_pictures = LabelledPictures(
            evaluation, column, Evaluating(self.processor), targets[1], channels, name="eval"
        )

    def layer_table(self) -> str:
        """Ids, learning rates and decay of the parameters."""
        recipe = self.recipe
        return layer_table(
            layerwise_parameter_groups(
                self.model,
                self.config,
                recipe.weight_decay,
                recipe.learning_rate,
                recipe.layer_decay,
                recipe.count_stem,
            )
        )

    def train(self) -> dict[str, float]:
        """
        Trains, evaluates, and writes the model, its processor and all figures to the output folder; where the recipe
        says `evaluate_only`, `evaluate` alone.

        Returns:
            The metrics of the last evaluation, of the best weights if training stops early.

        Raises:
            ValueError: for a folder that cannot be written, a checkpoint of another recipe, too few pictures, and
                pictures that cannot be read.
            FloatingPointError: if the loss is not finite.
        """
        if self.recipe.evaluate_only:
            return self.evaluate()
        args = self._training_arguments()
        if args.n_gpu > 1:  # Trainer would split the model's batches over them, on top of the published batch
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs: start with torchrun --nproc_per_node {args.n_gpu}, or set "
                "CUDA_VISIBLE_DEVICES=0."
            )
        together = self.recipe.effective_batch_size
        if len(self.train_pictures) < together:
            raise ValueError(
                f"{len(self.train_pictures)} pictures to learn from are fewer than effective_batch_size {together}: "
                "lower it, and the learning rate goes with it."
            )
        args.gradient_accumulation_steps = self.recipe.accumulation_steps(args.world_size)
        checkpoint = self._checkpoint()
        for pictures in (self.train_pictures, self.eval_pictures):
            check_pictures(pictures, self.recipe.check_images)
        if self.recipe.gradient_checkpointing:
            self._enable_gradient_checkpointing()
        trainer = self._trainer(args)
        if self.recipe.ema_decay is not None:
            trainer.start_average(checkpoint)
        if trainer.is_world_process_zero():
            self._remember(self.recipe.identity())
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.keep_average()
        vars(self.config).pop("use_cache", None)  # Trainer sets it, and it would be saved; HiViT has no cache
        metrics = trainer.evaluate()
        self._report(trainer, metrics)
        self._save(trainer)
        trainer.accelerator.wait_for_everyone()  # a process that leaves first may take the others with it
        trainer.accelerator.end_training()
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def evaluate(self) -> dict[str, float]:
        """
        Evaluates the model as it is, and writes figures and what was asked for to the output folder.

        Raises:
            ValueError: for pictures that cannot be read, and a folder that cannot be written.
        """
        self._make_folder()
        check_pictures(self.eval_pictures, self.recipe.check_images)
        trainer = self._trainer(self._training_arguments())
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            self._remember(asdict(self.recipe))
        self._report(trainer, metrics)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def _report(self, trainer: ClassifierTrainer, metrics: dict[str, float]):
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    def _enable_gradient_checkpointing(self):
        # the argument of `Trainer` changes its name between versions
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _training_arguments(self) -> TrainingArguments:
        recipe = self.recipe
        _, best, greater = metrics_of(recipe.problem_type, self.labels.names)
        length = {"num_train_epochs": recipe.epochs, "max_steps": recipe.max_steps or -1}
        return training_arguments(recipe, best, greater, **length)

    def _trainer(self, args: TrainingArguments) -> ClassifierTrainer:
        recipe = self.recipe
        compute_metrics, _, _ = metrics_of(recipe.problem_type, self.labels.names)
        batches = Batches(
            len(self.labels.names),
            recipe.mixup,
            recipe.cutmix,
            recipe.mixup_probability,
            recipe.mixup_switch_probability,
            recipe.label_smoothing,
        )
        return self._make_trainer(ClassifierTrainer, args, data_collator=batches, compute_metrics=compute_metrics)

    def _make_trainer(self, trainer_class: type[ClassifierTrainer], args: TrainingArguments, **keywords):
        following = _Following(self.train_pictures)
        callbacks = [following, _FiniteLoss()]
        if self.recipe.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(self.recipe.early_stopping_patience))
        following.trainer = trainer_class(
            self.recipe,
            self.config,
            model=self.model,
            args=args,
            train_dataset=self.train_pictures,
            eval_dataset=self.eval_pictures,
            processing_class=self.processor,
            callbacks=callbacks,
            **keywords,
        )
        return following.trainer

    def _checkpoint(self) -> str | None:
        """Where to go on from. ValueError if there is nothing, or it is of another recipe."""
        recipe, output = self.recipe, Path(self.recipe.output_dir)
        if recipe.resume is None:
            self._make_folder()
            return None
        latest = get_last_checkpoint(str(output)) if output.is_dir() else None
        found = latest if recipe.resume == "latest" else recipe.resume
        if found is None or not (Path(found) / "trainer_state.json").exists():
            raise ValueError(f"There is no checkpoint to resume at {found or output}: leave out --resume to begin.")
        path = Path(found).resolve().parent / "recipe.json"
        if path.exists():
            was, now = json.loads(path.read_text()), recipe.identity()
            if not was.keys() <= now.keys():
                raise ValueError(f"{path.parent} holds another kind of run: resume it with the script that began it.")
            for name, value in was.items():
                if now.get(name) != value:
                    raise ValueError(
                        f"{path.parent} was begun with {name}={value}, now it is {now.get(name)}: a resumption must be "
                        "of the same recipe. Set it back, or begin a new run in another --output_dir."
                    )
        return found

    def _make_folder(self):
        output = Path(self.recipe.output_dir)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{output} cannot be written ({error.strerror}). Choose another --output_dir.") from error

    def _remember(self, numbers: dict):
        (Path(self.recipe.output_dir) / "recipe.json").write_text(json.dumps(numbers, indent=1) + "\n")

    def _save(self, trainer: ClassifierTrainer):
        """The folder that pipelines load. An adapter lies beside the weights that it changes."""
        recipe, output = self.recipe, self.recipe.output_dir
        if recipe.lora_rank is not None and trainer.is_world_process_zero():
            for lora in self.model.peft_config.values():
                lora.base_model_name_or_path = recipe.hub_model_id or output
        trainer.save_state()
        if recipe.lora_rank is not None and trainer.is_world_process_zero():
            _start(recipe, self.labels).model.save_pretrained(output)
        trainer.save_model(_internal_call=True)  # which does not push
        self._push(trainer, "image-classification", recipe.dataset_name)

    def _push(self, trainer: ClassifierTrainer, task: str, dataset_name: str | None = None):
        """Uploads the folder, if that was asked for."""
        if self.recipe.push_to_hub:
            local = dataset_name is None or Path(dataset_name).exists()  # no path of this machine
            trainer.push_to_hub(dataset=None if local else dataset_name, tags=[task, "hivit"])


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


def _sample(length: int, limit: int | None, seed: int) -> list[int]:
    """All rows, or `limit` of them at random, ascending."""
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def _start(recipe: FinetuneRecipe, labels: Labels) -> Start:
    """The classifier that a recipe begins with, the same for the same seed."""
    set_seed(recipe.seed)
    changes = recipe.model_changes()
    changes["drop_path_rate"] = recipe.drop_path_rate
    fresh = (recipe.head_init_std, recipe.draw_relative_tables)
    if recipe.from_scratch:
        if recipe.image_size is not None:
            changes["image_size"] = recipe.image_size
        return random_classifier(recipe.architecture, labels.names, recipe.problem_type, changes, *fresh)
    return load_classifier(
        recipe.model_name_or_path,
        labels.names,
        recipe.problem_type,
        recipe.architecture,
        changes,
        recipe.image_size,
        *fresh,
    )


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
        """Raises ValueError for numbers that nothing can be learnt with."""
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
