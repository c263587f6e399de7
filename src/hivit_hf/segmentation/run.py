# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation of segmenters with `transformers.Trainer`, from a recipe."""

from collections.abc import Callable, Iterator
from pathlib import Path

import evaluate
import numpy as np
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..classification.run_old import FinetuneRun
from ..data.datasets import evaluation_split, sample_rows
from ..training.dense_old import DenseTrainer
from ..training.initialization import pyramid_start
from ..training.optim import poly_learning_rate
from ..training.trainer_old import training_arguments
from .arguments import SegmentationRecipe
from .data import IGNORED, MappedImages, TrainingCrop, WholeImage
from .modeling import (
    SegmenterStart,
    check_segmenter,
    load_segmenter,
    new_segmenter,
    predict,
    resize_pyramid,
    segmenter_processor,
    share_batch_norms,
)
from .overlays import overlay_sheet


IMAGES = "overlays.png"  # in the output folder


class SegmentationTrainer(DenseTrainer):
    """
    `Trainer` with the published recipe of segmenters: layer-wise decay in the dense numbering, a polynomial schedule,
    and evaluations of whole images, by sliding windows, at several scales and mirrored if the recipe says so.

    Args:
        recipe: the numbers.
        config: of the HiViT.
        metric_path: of the `evaluate` module that compares class maps.
        keywords: of `Trainer`.
    """

    def __init__(self, recipe: SegmentationRecipe, config, metric_path: str | Path, **keywords):
        self.metric = evaluate.load(str(metric_path))
        self.shown: list[tuple[PILImage.Image, np.ndarray, np.ndarray]] = []
        super().__init__(recipe, config, **keywords)
        self.model_accepts_loss_kwargs = False  # UPerNet takes any keyword and ignores it; its losses are means

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of all steps, also where `max_steps` ends the training earlier."""
        if self.lr_scheduler is None:
            total, warmup, power = self.recipe.total_steps, self.recipe.warmup_steps, self.recipe.poly_power
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: poly_learning_rate(min(step, total), total, warmup, 1.0, power),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Compares the class maps of all images at their own size with the true ones; keeps some to be shown. Each
        process counts its own pixels, one image after the other, and the scores are those of the sum.
        """
        names, dataset, rows = self.recipe.label_names, dataloader.dataset.dataset, dataloader.dataset.indices
        counts, self.shown = np.zeros((len(names), len(names)), dtype=np.int64), []
        for row, (predicted, item) in zip(rows, self._predictions(dataloader)):
            predicted, true = predicted.numpy(), item["labels"].numpy()
            counts += self.metric.counts(predicted, true, len(names), IGNORED, row)
            if len(self.shown) < self.recipe.shown_images and self.is_world_process_zero():
                self.shown.append((dataset.image(row), true, predicted))
        counts = self.accelerator.reduce(torch.from_numpy(counts).to(self.args.device), "sum").cpu().numpy()
        scores = self.metric.scores(counts)
        metrics = {f"{metric_key_prefix}_{name}": scores[name] for name in ("mean_iou", "mean_accuracy")}
        metrics[f"{metric_key_prefix}_pixel_accuracy"] = scores["overall_accuracy"]
        known = [(name, iou) for name, iou in zip(names, scores["per_category_iou"]) if iou is not None]
        metrics |= {f"{metric_key_prefix}_iou_{name}": iou for name, iou in known}
        return EvalLoopOutput(None, None, metrics, len(dataset))

    def _predictions(self, dataloader: DataLoader) -> Iterator[tuple[torch.Tensor, dict]]:
        recipe, model = self.recipe, self.model
        was_training = model.training
        model.eval()
        bar = tqdm(dataloader, desc="evaluating", unit="image", disable=not self.is_world_process_zero(), leave=False)
        try:
            for (item,) in bar:  # one, as images have many sizes
                with self.accelerator.autocast():
                    probabilities = predict(
                        model,
                        item["pixel_values"].to(self.args.device),
                        recipe.eval_size or recipe.crop_size,
                        recipe.crop_size,
                        recipe.eval_stride,
                        recipe.eval_scales,
                        recipe.eval_flip,
                        self.hivit_config.patch_size,
                    )
                yield probabilities.argmax(dim=0).cpu(), item
        finally:
            model.train(was_training)

    def show(self, path: Path):
        """Writes what the last evaluation has kept as a image."""
        if self.shown and self.is_world_process_zero():
            overlay_sheet(self.shown, self.recipe.label_names).save(path)


class SegmentationRun(FinetuneRun):
    """
    Everything of one training of a segmenter, made from a recipe; `train` does it.

    Args:
        recipe: the numbers, checked.
        metric_path: of the `evaluate` module that compares class maps.
        say: takes a sentence for the user.

    Raises:
        ValueError: as `FinetuneRun`.
    """

    def __init__(self, recipe: SegmentationRecipe, metric_path: str | Path, say: Callable[[str], None] = print):
        self.metric_path = metric_path
        super().__init__(recipe, say)

    def _choose(self, splits):
        """As in `FinetuneRun`; what is only judged needs no images to learn from, and there are none then."""
        recipe = self.recipe
        if recipe.evaluate_only and recipe.eval_fraction is None:
            return None, evaluation_split(splits, recipe.eval_split)
        return super()._choose(splits)

    def _build(self, train, evaluation):
        recipe = self.recipe
        splits = {"train": train, "eval": evaluation} if train is not None else {"eval": evaluation}
        for name, split in splits.items():
            for column, flag in ((recipe.image_column, "image_column"), (recipe.map_column, "map_column")):
                if column not in split.features:
                    raise ValueError(
                        f"{name} has no column {column!r}; its columns are {', '.join(split.features)}. Name it with "
                        f"--{flag}."
                    )
        self.start = _start(recipe)
        for note in self.start.notes:
            self.say(note)
        self.model, self.config = self.start.model, self.start.model.backbone.config
        if recipe.freeze_backbone:
            self.model.backbone.hivit.requires_grad_(False)
        mean, std = recipe.image_mean or self.start.mean, recipe.image_std or self.start.std
        channels = self.config.num_channels
        if not len(mean) == len(std) == channels:
            raise ValueError(f"image_mean and image_std need {channels} numbers, got {mean} and {std}.")
        self.processor = segmenter_processor(recipe.crop_size, mean, std)
        crop = TrainingCrop(
            recipe.crop_size,
            mean,
            std,
            recipe.scale_range,
            recipe.max_class_share,
            recipe.flip_probability,
            recipe.photometric,
        )
        transforms = {"train": crop, "eval": WholeImage(mean, std)}
        limits = {"train": recipe.max_train_samples, "eval": recipe.max_eval_samples}
        images = {
            name: MappedImages(
                split.select(sample_rows(len(split), limits[name], recipe.seed)),
                recipe.image_column,
                recipe.map_column,
                transforms[name],
                len(recipe.label_names),
                recipe.reduce_labels,
                channels,
                recipe.seed if name == "train" else None,
                name,
            )
            for name, split in splits.items()
        }
        self.train_images, self.eval_images = images.get("train"), images["eval"]

    def _report(self, trainer: SegmentationTrainer, metrics: dict[str, float]):
        super()._report(trainer, metrics)
        trainer.show(Path(self.recipe.output_dir) / IMAGES)

    def _training_arguments(self) -> TrainingArguments:
        recipe = self.recipe
        return training_arguments(recipe, "mean_iou", True, max_steps=recipe.max_steps or recipe.total_steps)

    def _enable_gradient_checkpointing(self):
        self.model.backbone.gradient_checkpointing_enable({"use_reentrant": False})

    def _trainer(self, args: TrainingArguments) -> SegmentationTrainer:
        self.model = share_batch_norms(self.model, args.world_size, args.device)
        return self._make_trainer(SegmentationTrainer, args, metric_path=self.metric_path)

    def _save(self, trainer: SegmentationTrainer):
        trainer.save_state()
        trainer.save_model(_internal_call=True)  # which does not push
        self._push(trainer, "image-segmentation", self.recipe.dataset_name)


def _start(recipe: SegmentationRecipe) -> SegmenterStart:
    changes = recipe.model_changes() | {"drop_path_rate": recipe.drop_path_rate}
    head = {name: getattr(recipe, name) for name in ("head_channels", "auxiliary_channels", "auxiliary_weight")}
    head = {name: value for name, value in head.items() if value is not None}
    if recipe.evaluate_only:
        check_segmenter(recipe.model_name_or_path)
    if not recipe.from_scratch:
        return load_segmenter(
            recipe.model_name_or_path, recipe.label_names, recipe.architecture, changes, recipe.crop_size, **head
        )
    start = pyramid_start(None, recipe.architecture, changes)
    resize_pyramid(start.backbone, recipe.crop_size)
    return new_segmenter(start, recipe.label_names, **head)
