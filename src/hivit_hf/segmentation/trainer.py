# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""`SegmentationTrainer`: the published polynomial schedule, mean IoU of images at their own size, overlays."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import Subset
from transformers.trainer_utils import SchedulerType

from ..training.dense import DenseTrainer
from ..training.optim import poly_learning_rate
from .arguments import SegmentationTrainingArguments
from .metrics import iou_scores, pixel_counts
from .modeling import share_batch_norms
from .overlays import draw_segmentation


OVERLAYS = "overlays.png"  # in the output folder


class SegmentationTrainer(DenseTrainer):
    """
    `DenseTrainer` for semantic segmentation.

    Args:
        model: UPerNet, with the names of the classes in its configuration.
        predict: from a model in eval mode and the pixels of an image (channels, H, W) to probabilities (classes, H, W).
        keywords: of `Trainer`.
    """

    args: SegmentationTrainingArguments

    def __init__(
        self,
        args: SegmentationTrainingArguments,
        model: nn.Module,
        predict: Callable[[nn.Module, torch.Tensor], torch.Tensor],
        **keywords,
    ):
        self.predict_image = predict
        self.samples: list[tuple[PILImage.Image, np.ndarray, np.ndarray]] = []  # to draw
        super().__init__(args, model=share_batch_norms(model, args.world_size, args.device), **keywords)
        self.class_names = [model.config.id2label[number] for number in range(model.config.num_labels)]
        self.model_accepts_loss_kwargs = False  # UPerNet takes any keyword and ignores it; its losses are means

    def learning_rate_factor(self, num_training_steps: int) -> Callable[[int], float] | None:
        args, total = self.args, num_training_steps
        if args.lr_scheduler_type != SchedulerType.POLYNOMIAL:
            return None
        warmup = args.get_warmup_steps(total)
        return lambda step: poly_learning_rate(min(step, total), total, warmup, 1.0, args.poly_power)

    def measure(self, batches: Iterable[list], images: Subset) -> dict[str, float]:
        """
        Mean IoU of all images at their own size; some are kept to be drawn. Each process counts its own pixels, one
        image after the other, and the scores are those of the sum.
        """
        names, self.samples = self.class_names, []
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        for row, (item,) in zip(images.indices, batches):
            with self.accelerator.autocast():
                probabilities = self.predict_image(self.model, item["pixel_values"].to(self.args.device))
            predicted, true = probabilities.argmax(dim=0).cpu().numpy(), item["labels"].numpy()
            counts += pixel_counts(predicted, true, len(names), number=row)
            if len(self.samples) < self.args.num_overlays and self.is_world_process_zero():
                self.samples.append((images.dataset.image(row), true, predicted))
        counts = self.accelerator.reduce(torch.from_numpy(counts).to(self.args.device), "sum").cpu().numpy()
        scores = iou_scores(counts)
        metrics = {name: scores[name] for name in ("mean_iou", "mean_accuracy")}
        metrics["pixel_accuracy"] = scores["overall_accuracy"]
        known = [(name, iou) for name, iou in zip(names, scores["per_category_iou"]) if iou is not None]
        return metrics | {f"iou_{name}": iou for name, iou in known}

    def save_overlays(self):
        """Draws what the last evaluation has kept to the output folder."""
        if self.samples and self.is_world_process_zero():
            draw_segmentation(self.samples, self.class_names).savefig(Path(self.args.output_dir) / OVERLAYS, dpi=110)
