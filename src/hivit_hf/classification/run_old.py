# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning of classifiers with `transformers.Trainer`."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.datasets import (
    check_images,
    open_splits,
    train_and_eval,
)
from ..data.labels import SINGLE
from ..data.transforms import ClassificationCollator
from ..training.optim import cosine_learning_rate, layer_table, layerwise_parameter_groups
from ..training.trainer_old import AVERAGE, FIGURES, _FiniteLoss, _Following, training_arguments
from .arguments_old import FinetuneRecipe
from .metrics import metrics_of


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
                recipe.count_early_layers,
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
        """What is learned from, and what is evaluated with."""
        recipe = self.recipe
        return train_and_eval(splits, recipe.train_split, recipe.eval_split, recipe.eval_fraction, recipe.seed)

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
                recipe.count_early_layers,
            )
        )

    def train(self) -> dict[str, float]:
        """
        Trains, evaluates, and writes the model, its processor and all figures to the output folder; where the recipe
        says `evaluate_only`, `evaluate` alone.

        Returns:
            The metrics of the last evaluation, of the best weights if training stops early.

        Raises:
            ValueError: for a folder that cannot be written, a checkpoint of another recipe, too few images, and
                images that cannot be read.
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
        if len(self.train_images) < together:
            raise ValueError(
                f"{len(self.train_images)} images to learn from are fewer than effective_batch_size {together}: "
                "lower it, and the learning rate goes with it."
            )
        args.gradient_accumulation_steps = self.recipe.accumulation_steps(args.world_size)
        checkpoint = self._checkpoint()
        for images in (self.train_images, self.eval_images):
            check_images(images, self.recipe.check_images)
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
            ValueError: for images that cannot be read, and a folder that cannot be written.
        """
        self._make_folder()
        check_images(self.eval_images, self.recipe.check_images)
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
        batches = ClassificationCollator(
            len(self.labels.names),
            recipe.mixup,
            recipe.cutmix,
            recipe.mixup_probability,
            recipe.mixup_switch_probability,
            recipe.label_smoothing,
        )
        return self._make_trainer(ClassifierTrainer, args, data_collator=batches, compute_metrics=compute_metrics)

    def _make_trainer(self, trainer_class: type[ClassifierTrainer], args: TrainingArguments, **keywords):
        following = _Following(self.train_images)
        callbacks = [following, _FiniteLoss()]
        if self.recipe.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(self.recipe.early_stopping_patience))
        following.trainer = trainer_class(
            self.recipe,
            self.config,
            model=self.model,
            args=args,
            train_dataset=self.train_images,
            eval_dataset=self.eval_images,
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
        recipe = self.recipe
        trainer.save_state()
        trainer.save_model(_internal_call=True)  # which does not push
        self._push(trainer, "image-classification", recipe.dataset_name)

    def _push(self, trainer: ClassifierTrainer, task: str, dataset_name: str | None = None):
        """Uploads the folder, if that was asked for."""
        if self.recipe.push_to_hub:
            local = dataset_name is None or Path(dataset_name).exists()  # no path of this machine
            trainer.push_to_hub(dataset=None if local else dataset_name, tags=[task, "hivit"])
