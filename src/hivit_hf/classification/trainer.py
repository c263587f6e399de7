# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`ClassificationTrainer`: the published cosine schedule, mixed and smoothed targets, metrics by problem type."""

from collections.abc import Callable

import torch
from transformers.trainer_utils import SchedulerType

from ..data.labels import SINGLE, LabelEncoding
from ..training.optim import cosine_learning_rate
from ..training.trainer import HiViTTrainer
from .arguments import ClassificationTrainingArguments
from .metrics import metrics_of


class ClassificationTrainer(HiViTTrainer):
    """
    `HiViTTrainer` for classifiers.

    Args:
        args: what the recipe says.
        labels: of the training data, which decide the metrics.
        keywords: of `Trainer`.
    """

    args: ClassificationTrainingArguments

    def __init__(self, args: ClassificationTrainingArguments, labels: LabelEncoding, **keywords):
        self.labels = labels
        compute_metrics, best, greater_is_better = metrics_of(labels.problem_type, labels.names)
        if args.metric_for_best_model is None:
            args.metric_for_best_model, args.greater_is_better = best, greater_is_better
        super().__init__(args, compute_metrics=compute_metrics, **keywords)

    def learning_rate_factor(self, num_training_steps: int) -> Callable[[int], float] | None:
        args, peak = self.args, self.args.learning_rate
        warmup = min(args.warmup_epochs * self.steps_per_epoch(), num_training_steps - 1)
        if args.warmup_steps:
            warmup = min(args.get_warmup_steps(num_training_steps), num_training_steps - 1)
        if args.lr_scheduler_type != SchedulerType.COSINE:
            args.warmup_steps = round(warmup)  # where transformers' schedules find it
            return None
        rates = (peak, args.min_learning_rate, args.warmup_learning_rate)
        return lambda step: (
            cosine_learning_rate(min(step, num_training_steps), num_training_steps, warmup, *rates) / peak
        )

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """Cross-entropy against class numbers or probabilities; other problems leave the loss to the model."""
        if self.hivit_config.problem_type != SINGLE or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = torch.nn.functional.cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss
