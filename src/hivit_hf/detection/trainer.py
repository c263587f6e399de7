# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`DetectionTrainer`: the published step schedule, average precision, overlays of detections."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import Subset
from transformers.trainer_utils import SchedulerType

from ..training.dense import DenseTrainer
from ..training.optim import stepped_learning_rate
from .arguments import DetectionTrainingArguments
from .metrics import BOX, MASK, as_results, average_precision
from .modeling import DetrBatches, RCNNBatches
from .overlays import draw_detections


OVERLAYS = "detections.png"  # in the output folder


class DetectionTrainer(DenseTrainer):
    """
    `DenseTrainer` for detectors.

    Args:
        batches: makes the model's inputs of items, and detections of its output.
        keywords: of `Trainer`; the data sets are `CocoImages`.

    Raises:
        ValueError: for a warmup that is as long as the training.
    """

    args: DetectionTrainingArguments

    def __init__(self, args: DetectionTrainingArguments, batches: RCNNBatches | DetrBatches, **keywords):
        self.batches = batches
        super().__init__(args, data_collator=self._collate, processing_class=batches.processor, **keywords)
        if args.do_train:
            self._check_warmup()

    def _collate(self, items: Sequence[dict]) -> dict:
        return self.batches(items, training=True)

    def _check_warmup(self):
        args = self.args
        per_epoch = max(1, len(self.train_dataset) // args.effective_batch_size)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
        warmup = args.get_warmup_steps(steps)
        if warmup >= steps:
            raise ValueError(f"warmup_steps {warmup} are not fewer than the {steps} steps of the training: lower them.")

    def learning_rate_factor(self, num_training_steps: int) -> Callable[[int], float] | None:
        args = self.args
        if args.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            return None
        warmup = args.get_warmup_steps(num_training_steps)
        milestones = [round(epoch * self.steps_per_epoch()) for epoch in args.decay_epochs]
        return lambda step: stepped_learning_rate(step, warmup, milestones, args.decay_factor, base=1.0)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The detector's sum of its losses."""
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def floating_point_ops(self, inputs: dict) -> int:
        """Not known: `Trainer` would count the elements of one tensor, but images are a list."""
        return 0

    def measure(self, batches: Iterable[list], images: Subset) -> dict[str, float]:
        """Average precision of boxes, and of masks if there are any."""
        dataset, results = images.dataset, []
        for items in batches:
            for item, detections in zip(items, self._detect(items)):
                results += as_results(item["image_id"], detections, dataset.annotations.category_ids)
        kinds = (BOX, MASK) if dataset.with_masks else (BOX,)
        image_ids = [image["id"] for image in dataset.images]
        return average_precision(gather_object(results), dataset.annotations, image_ids, kinds)

    @torch.no_grad()
    def _detect(self, items: Sequence[dict]) -> list[dict]:
        """Detections of the model in evaluation mode: a dict of tensors for each image, boxes in its pixels."""
        inputs = self._prepare_inputs(self.batches(items, training=False))
        with self.compute_loss_context_manager():
            output = self.model(**inputs)
        return self.batches.detections(output, [tuple(item["image"].shape[1:]) for item in items])

    def save_overlays(self):
        """Draws annotations and detections of the first validation images to the output folder."""
        images, args = self.eval_dataset, self.args
        if not args.num_overlays or not self.is_world_process_zero():
            return
        items = [images[row] for row in range(min(args.num_overlays, len(images)))]
        self.model.eval()
        found = [detections for item in items for detections in self._detect([item])]
        drawn = draw_detections(items, found, images.annotations.names, args.overlay_threshold)
        drawn.save(Path(args.output_dir) / OVERLAYS)
