# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`HiViTTrainer`, what all tasks share: layer-wise learning rates, moving average, schedule, whole batches."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import TrainOutput

from ..configuration_hivit import HiViTConfig
from ..modeling_hivit import HiViTPreTrainedModel
from .arguments import REFUSED, HiViTTrainingArguments
from .folders import flush_folder, remove_folder
from .manifest import AVERAGE, MANIFEST, loading, newest_whole, write_manifest
from .optim import layer_table, layerwise_parameter_groups
from .resumption import decided_by_main, trainer_checkpoints


def hivit_config(model: torch.nn.Module) -> HiViTConfig:
    """The configuration of the HiViT that a model is or has inside."""
    return next(part.config for part in model.modules() if isinstance(part, HiViTPreTrainedModel))


class HiViTTrainer(Trainer):
    """
    `Trainer` with what all published recipes share: AdamW (or any `--optim`) with layer-wise learning rate decay, the
    recipe's schedule, whole training batches, a moving average of the weights, a stop at a loss that is not finite.

    Args:
        args: what the recipe says.
        keywords: of `Trainer`. The training data set has an attribute `epoch`, which its augmentations depend on.

    Raises:
        ValueError: if one process has several GPUs, among which `Trainer` would split its batches, and for FSDP and
            DeepSpeed.
    """

    args: HiViTTrainingArguments

    def __init__(self, args: HiViTTrainingArguments, **keywords):
        if args.n_gpu > 1:
            raise ValueError(
                f"One process has {args.n_gpu} GPUs: start with torchrun --nproc_per_node {args.n_gpu}, or set "
                "CUDA_VISIBLE_DEVICES=0."
            )
        self.average: AveragedModel | None = None
        super().__init__(args=args, **keywords)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(f"FSDP and DeepSpeed are refused: {REFUSED['fsdp']}.")
        self.loss_is_scaled_for_ga = False  # the losses are means
        self.hivit_config = hivit_config(self.model)
        self.add_callback(RecipeCallback(self))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    # -- data, optimizer, schedule

    def get_train_dataloader(self) -> DataLoader:
        """
        Whole batches only, as in the original; the last step of an epoch may accumulate fewer of them. `Trainer` has
        one switch for this and evaluations, which need all images.

        With `--auto_find_batch_size`, the images per optimizer step remain: smaller batches, more of them.
        """
        if self.args.auto_find_batch_size:
            self._train_batch_size = self._fitting_batch_size(self._train_batch_size)
            steps = self.args.accumulation_steps(self._train_batch_size, self.args.world_size)
            self.args.gradient_accumulation_steps = steps
        self.args.dataloader_drop_last = True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = False

    def _fitting_batch_size(self, limit: int) -> int:
        """The largest batch size up to `limit` that adds up to the images per step; even if the first is (mixup)."""
        images = self.args.effective_batch_size // self.args.world_size
        parity = 2 - self.args.per_device_train_batch_size % 2
        return max((size for size in range(parity, limit + 1, parity) if images % size == 0), default=1)

    def parameter_groups(self) -> list[dict]:
        """The trainable parameters by layer, with learning rates and weight decay."""
        args = self.args
        return layerwise_parameter_groups(
            self.model,
            self.hivit_config,
            args.weight_decay,
            args.learning_rate,
            args.layer_decay,
            args.count_early_layers,
        )

    def layer_table(self) -> str:
        """Layer ids, learning rates and weight decay of the parameters, as a table."""
        return layer_table(self.parameter_groups())

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of `--optim` over `parameter_groups`. Raises ValueError for one that groups by itself."""
        if self.optimizer is None:
            optimizer_class, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & keywords.keys():
                raise ValueError(
                    f"--optim {self.args.optim} groups the parameters by itself, without layer_decay: take another one."
                )
            groups = [
                {key: group[key] for key in ("params", "lr", "weight_decay")} for group in self.parameter_groups()
            ]
            self.optimizer = optimizer_class(groups, **keywords)
        return self.optimizer

    def learning_rate_factor(self, num_training_steps: int) -> Callable[[int], float] | None:
        """The recipe's schedule, from steps to factors of the peak; None for the one of `--lr_scheduler_type`."""
        return None

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        factor = self.learning_rate_factor(num_training_steps)
        if self.lr_scheduler is not None or factor is None:
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            except TypeError as error:
                raise ValueError(
                    f"lr_scheduler_kwargs {self.args.lr_scheduler_kwargs} do not fit lr_scheduler_type "
                    f"{self.args.lr_scheduler_type.value}: {error}"
                ) from error
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)

    # -- training, with the moving average, which is what is evaluated and kept; the weights themselves are trained on

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in `Trainer`; afterwards the model has the averaged weights, if there are any.

        Raises:
            ValueError: for fewer images than an optimizer step takes.
            FloatingPointError: if the loss is not finite.
        """
        if len(self.train_dataset) < self.args.effective_batch_size:
            raise ValueError(
                f"{len(self.train_dataset)} training images are fewer than effective_batch_size "
                f"{self.args.effective_batch_size}: lower it, and the learning rate is lowered with it."
            )
        self.accelerator.print(
            f"processes: {self.args.world_size}, parameters: {self.model.num_parameters():,}, images per step: "
            f"{self.args.effective_batch_size}, peak learning rate: {self.args.learning_rate:.3g}"
        )
        if self.args.ema_decay is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(self.args.ema_decay))
            if resume_from_checkpoint:
                with loading(resume_from_checkpoint):
                    load_model(self.average, Path(resume_from_checkpoint) / AVERAGE)
            self.average.to(self.args.device)
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
            self.average = None
        vars(self.model.config).pop("use_cache", None)  # Trainer sets it, and it would be saved; HiViT has no cache
        return output

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

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        """As in `Trainer`. Raises ValueError if the metric that decides which checkpoint is best does not exist."""
        with self.averaged_weights():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        best = self.args.metric_for_best_model and self.args.metric_for_best_model.removeprefix("eval_")
        names = [name.removeprefix(f"{metric_key_prefix}_") for name in metrics]
        if self.is_in_train and best is not None and best not in names:
            raise ValueError(f"There is no metric_for_best_model {best}; the metrics are {', '.join(names)}.")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        super()._save(output_dir, state_dict)
        if self.average is not None and self.args.should_save:
            save_model(self.average, str(Path(output_dir or self.args.output_dir) / AVERAGE))  # weights may be shared

    def _save_checkpoint(self, model, trial):
        """
        As in `Trainer`, then the manifest, without which a checkpoint is not resumed from; and only then is it
        uploaded, and are older ones deleted.
        """
        args, folder = self.args, Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        if args.should_save:
            (checkpoint / MANIFEST).unlink(missing_ok=True)  # of an earlier attempt
        limit, args.save_total_limit = args.save_total_limit, None
        push, args.push_to_hub = args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()  # each has written its random state
        if args.should_save:
            write_manifest(checkpoint, {"step": self.state.global_step})
            flush_folder(checkpoint)
        if push:
            self._push_from_checkpoint(str(checkpoint))
        if args.should_save and limit:
            self._delete_checkpoints(folder, limit)

    def _delete_checkpoints(self, folder: Path, limit: int):
        """As `Trainer` does, the oldest ones beyond the limit, never the newest nor the best; a kill leaves no half."""
        newest_first = sorted(trainer_checkpoints(folder), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        best = self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint).absolute()
        kept = [path for path in newest_first if path == newest_first[0] or path.absolute() == best]
        others = [path for path in newest_first if path not in kept]
        for superfluous in others[max(limit - len(kept), 0) :]:
            remove_folder(superfluous)
        for left in folder.glob(".checkpoint-*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        with loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        with loading(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None):
        with loading(checkpoint or ""):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None):
        with loading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        """As in `Trainer`. Raises ValueError if the checkpoint is damaged."""
        best = Path(self.state.best_model_checkpoint)
        decided_by_main(lambda: newest_whole([best]))
        super()._load_best_model()
        if self.average is not None:
            load_model(self.average, Path(self.state.best_model_checkpoint) / AVERAGE)

    # -- results

    def save_evaluation(self, metrics: dict[str, float]):
        """Prints metrics and writes them to the output folder."""
        self.log_metrics("eval", metrics)
        self.save_metrics("eval", metrics)

    def save_and_push(self, task: str, dataset_name: str | None = None):
        """
        Writes the model, its processor and the log to the output folder, and uploads it with `--push_to_hub`.

        Args:
            task: of the model card, such as "image-classification".
            dataset_name: of the Hub, for the model card; a local one is left out.
        """
        self.save_state()
        self.save_model(_internal_call=True)  # which does not push
        if self.args.push_to_hub:
            local = dataset_name is None or Path(dataset_name).exists()  # no path of this machine
            self.push_to_hub(dataset=None if local else dataset_name, tags=[task, "hivit"])

    def end(self):
        """Waits for all processes: one that leaves early may take the others with it."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


class RecipeCallback(TrainerCallback):
    """Epochs of augmentations, updates of the moving average, `--stop_after_steps`, losses that are not finite."""

    def __init__(self, trainer: HiViTTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.trainer.train_dataset.epoch = int(state.epoch or 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)
        if args.stop_after_steps is not None and state.global_step >= args.stop_after_steps:
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"The loss is {logs['loss']} in step {state.global_step}. Lower the learning rate, lengthen the "
                "warmup, or check the images for NaN."
            )
