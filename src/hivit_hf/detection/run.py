# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training of detectors with `transformers.Trainer`, average precision, and images of what they find."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..classification.run_old import FinetuneRun
from ..configuration_hivit import nearest_multiples
from ..data.datasets import sample_rows
from ..training.dense_old import DenseTrainer
from ..training.initialization import DenseStart, check_architecture, normalization, pyramid_start
from ..training.optim import stepped_learning_rate
from ..training.trainer_old import training_arguments
from .arguments import DetectionRecipe
from .data import CocoAnnotations, CocoImages, large_scale_jitter, read_coco
from .metrics import BOX, MASK, as_results, average_precision
from .modeling import (
    DetrBatches,
    RCNNBatches,
    build_detector,
    detr_processor,
    is_detector,
    load_detector,
    out_features_of,
    pyramid_of,
)
from .overlays import draw_detections


IMAGES = "detections.png"  # in the output folder


class DetectorTrainer(DenseTrainer):
    """
    `Trainer` for detectors: layer-wise decay, a schedule in steps, and evaluation by average precision.

    Args:
        recipe: the numbers.
        config: of the HiViT inside.
        batches: makes the model's input of items and detections of its output.
        keywords: of `Trainer`, without a collator.
    """

    def __init__(self, recipe: DetectionRecipe, config, batches: RCNNBatches | DetrBatches, **keywords):
        self.batches = batches
        super().__init__(recipe, config, data_collator=self._collate, **keywords)

    def _collate(self, items: Sequence[dict]) -> dict:
        return self.batches(items, training=True)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The schedule of all epochs, also where `max_steps` ends the training earlier."""
        if self.lr_scheduler is None:
            recipe = self.recipe
            per_epoch = -(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps)
            milestones = [round(epoch * per_epoch) for epoch in recipe.decay_epochs]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer,
                lambda step: stepped_learning_rate(
                    step, recipe.warmup_steps, milestones, recipe.decay_factor, base=1.0
                ),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        """The sum that the detector makes of its losses."""
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def floating_point_ops(self, inputs: dict) -> int:
        """Not known: `Trainer` would count the elements of one tensor, but images are a list."""
        return 0

    def evaluation_loop(
        self, dataloader, description: str, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ) -> EvalLoopOutput:
        """Average precision of boxes, and of masks if there are any; the detections are in `predictions`."""
        images, model = self.eval_dataset, self._wrap_model(self.model, training=False)
        coco, results = images.annotations, []
        model.eval()
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        for items in tqdm(dataloader, desc=description, unit="batch", disable=hidden, leave=False):
            for item, detections in zip(items, self.detect(model, items)):
                results += as_results(item["image_id"], detections, coco.category_ids)
        results = gather_object(results)
        kinds = (BOX, MASK) if self.recipe.with_masks else (BOX,)
        metrics = average_precision(results, coco, [image["id"] for image in images.images], kinds)
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=results, label_ids=None, metrics=named, num_samples=len(images))

    @torch.no_grad()
    def detect(self, model, items: Sequence[dict]) -> list[dict]:
        """What the model, in evaluation mode, finds on images: a dict of tensors for each, boxes in their pixels."""
        inputs = self._prepare_inputs(self.batches(items, training=False))
        with self.compute_loss_context_manager():
            output = model(**inputs)
        return self.batches.detections(output, [tuple(item["image"].shape[1:]) for item in items])


class DetectionRun(FinetuneRun):
    """
    Everything of one training of a detector, made from a recipe; `train` does it.

    Args:
        recipe: the numbers, checked.
        say: takes a sentence for the user.

    Raises:
        ValueError: as `FinetuneRun`, for annotations in place of data and labels.
    """

    def _prepare(self):
        recipe = self.recipe
        evaluation = self._read(recipe.eval_annotations, recipe.eval_images)
        train = evaluation  # of which only the categories are used then
        if not recipe.evaluate_only:
            train = self._read(recipe.train_annotations, recipe.train_images)
            _check_same_categories(train, evaluation)
        mean = self._build(train.names)
        self._make_images(train, evaluation, mean)

    def _read(self, annotations: str, folder: str | None) -> CocoAnnotations:
        read = read_coco(annotations, folder, self.recipe.with_masks, self.recipe.bad_annotations == "leave_out")
        if read.left_out:
            self.say(f"{len(read.left_out)} annotations of {annotations} were left out. The first: {read.left_out[0]}")
        return read

    def _build(self, names: Sequence[str]) -> Sequence[float]:
        """The model, and what makes its batches. Returns the mean of each channel."""
        recipe, sizes = self.recipe, (self.recipe.eval_min_size, self.recipe.eval_max_size)
        trained = recipe.model_name_or_path is not None and is_detector(recipe.model_name_or_path)
        if recipe.evaluate_only and not trained:
            raise ValueError(f"{recipe.model_name_or_path} is no detector: train one first, without --evaluate_only.")
        if trained:
            self.model = load_detector(recipe.model_name_or_path, recipe.detector, names, recipe.head_changes(), sizes)
            self.config = pyramid_of(self.model).config
            mean, std = self._check_trained()
        else:
            start = self._start()
            mean, std, self.config = start.mean, start.std, start.backbone.config
            head = recipe.head_changes()
            if recipe.detector != "deformable_detr":
                head |= {"min_size": sizes[0], "max_size": sizes[1]}
            self.model = build_detector(recipe.detector, start, names, head)
        if recipe.freeze_backbone:
            pyramid_of(self.model).hivit.requires_grad_(False)
        self.processor, self.batches = None, RCNNBatches()
        if recipe.detector == "deformable_detr":
            if recipe.crop_size % self.config.patch_size:
                raise ValueError(
                    f"crop_size must be a multiple of {self.config.patch_size}, got {recipe.crop_size}: take "
                    f"{nearest_multiples(recipe.crop_size, self.config.patch_size)}."
                )
            self.processor = detr_processor(self.config.patch_size, *sizes, mean, std)
            self.batches = DetrBatches(self.processor, recipe.crop_size)
        return mean

    def _start(self) -> DenseStart:
        recipe = self.recipe
        changes = recipe.model_changes() | {"drop_path_rate": recipe.drop_path_rate}
        start = pyramid_start(recipe.model_name_or_path, recipe.architecture, changes, out_features_of(recipe.detector))
        for note in start.notes:
            self.say(note)
        start = replace(start, mean=recipe.image_mean or start.mean, std=recipe.image_std or start.std)
        channels = start.backbone.config.num_channels
        if not len(start.mean) == len(start.std) == channels:
            raise ValueError(f"image_mean and image_std need {channels} numbers, got {start.mean} and {start.std}.")
        return start

    def _check_trained(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation of a trained detector, which must be as the recipe wants it."""
        recipe, name = self.recipe, self.recipe.model_name_or_path
        if recipe.detector == "deformable_detr":
            mean, std = normalization(name, self.config.num_channels)
        else:
            mean, std = self.model.config.image_mean, self.model.config.image_std
        if recipe.architecture is not None:
            check_architecture(self.config, recipe.architecture, name, recipe.model_changes())
        wanted = {"--image_mean": (mean, recipe.image_mean or mean), "--image_std": (std, recipe.image_std or std)}
        for key, value in recipe.model_changes().items():
            wanted[f"{key} in --model"] = (getattr(self.config, key, None), value)
        for what, (own, value) in wanted.items():
            if own != value:
                raise ValueError(f"The detector {name} has {own}, not {what} {value}: leave that out.")
        return mean, std

    def _make_images(self, train: CocoAnnotations, evaluation: CocoAnnotations, mean: Sequence[float]):
        recipe = self.recipe
        learned, empty = train.with_objects(), len(train.images) - len(train.with_objects())
        if empty:
            first = next(image for image in train.images if image not in learned)
            self.say(
                f"{empty} of {len(train.images)} images to learn from have no annotation and are left out, as is "
                f"published; the first is {first['id']} ({first['file_name']})."
            )
        limits = ((learned, recipe.max_train_samples), (evaluation.images, recipe.max_eval_samples))
        learned, evaluated = ([images[row] for row in sample_rows(len(images), n, recipe.seed)] for images, n in limits)
        jitter = large_scale_jitter(recipe.crop_size, recipe.jitter_scale, recipe.flip_probability, mean)
        masks, channels = recipe.with_masks, self.config.num_channels
        self.train_images = CocoImages(train, learned, masks, jitter, recipe.seed, "train", channels)
        self.eval_images = CocoImages(evaluation, evaluated, masks, None, recipe.seed, "eval", channels)

    def _training_arguments(self) -> TrainingArguments:
        return training_arguments(
            self.recipe, "box_ap", True, num_train_epochs=self.recipe.epochs, max_steps=self.recipe.max_steps or -1
        )

    def _trainer(self, args: TrainingArguments) -> DetectorTrainer:
        return self._make_trainer(DetectorTrainer, args, batches=self.batches)

    def train(self) -> dict[str, float]:
        """As in `FinetuneRun`. Raises ValueError for a warm-up that is as long as the training, too."""
        recipe = self.recipe
        steps = math.ceil(recipe.epochs * max(1, len(self.train_images) // recipe.effective_batch_size))
        if recipe.warmup_steps >= steps and not recipe.evaluate_only:
            raise ValueError(
                f"warmup_steps {recipe.warmup_steps} are not fewer than the {steps} steps of the training: lower them."
            )
        return super().train()

    def _report(self, trainer: DetectorTrainer, metrics: dict[str, float]):
        super()._report(trainer, metrics)
        self._draw(trainer)

    def _save(self, trainer: DetectorTrainer):
        """The folder that `from_pretrained` loads."""
        vars(self.model.config).pop("use_cache", None)  # Trainer sets it, and it would be saved
        trainer.save_state()
        trainer.save_model(_internal_call=True)  # which does not push
        self._push(trainer, "object-detection")

    def _draw(self, trainer: DetectorTrainer):
        count = min(self.recipe.num_images, len(self.eval_images))
        if count and trainer.is_world_process_zero():
            items = [self.eval_images[row] for row in range(count)]
            self.model.eval()
            found = [detections for item in items for detections in trainer.detect(self.model, [item])]
            drawn = draw_detections(items, found, self.eval_images.annotations.names, self.recipe.image_threshold)
            drawn.save(Path(self.recipe.output_dir) / IMAGES)


def _check_same_categories(train: CocoAnnotations, evaluation: CocoAnnotations):
    for number, name in zip(evaluation.category_ids, evaluation.names):
        known = dict(zip(train.category_ids, train.names))
        if known.get(number) != name:
            raise ValueError(
                f"Category {number} is {name!r} in {evaluation.path}, but {known.get(number)!r} in {train.path}: both "
                "must have the same ids and names."
            )
    if len(evaluation.names) != len(train.names):
        lacking = sorted(set(train.names) - set(evaluation.names))[0]
        raise ValueError(f"{evaluation.path} lacks the category {lacking!r} of {train.path}: list it there too.")
