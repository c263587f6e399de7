# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Classifiers judged: accuracy and speed, robustness against damaged pictures, and soups of several of them."""

import json
from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
import torch
from evaluate.evaluator.image_classification import ImageClassificationEvaluator
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..hub import load_processor
from ..modeling_hivit import HiViTForImageClassification, cut_into_units
from ..pictures import pixel_statistics
from .augment import normalize
from .classifier import read_config, silent_transformers
from .labelled import SINGLE, Batches, Evaluating, LabelledPictures, find_labels, seeded
from .metrics import top_k_accuracy


SEVERITIES = (1, 2, 3, 4, 5)
DROPPED = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the units that are left out, by severity


def load_for_evaluation(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A classifier of one label per picture, with its adapter if it has one, and its image processor.

    Raises:
        ValueError: if there is none.
    """
    config = read_config(name)
    if config.problem_type not in (None, SINGLE):
        raise ValueError(f"{name} is for {config.problem_type}, but this is for one label per picture.")
    if not any("ImageClassification" in kind for kind in config.architectures or []):
        raise ValueError(f"{name} is no classifier: fine-tune it first (examples/finetune_classification.py).")
    with silent_transformers():
        model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32).eval()
        processor = load_processor(name, config)
    return model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), processor


def targets_for(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    split: str,
    column: str | None = None,
    names: Sequence[str] = (),
) -> torch.Tensor:
    """
    The labels of a dataset as class numbers of the model, which are matched by name: (pictures,).

    Args:
        model: the classifier.
        dataset: the pictures.
        split: its name, for messages.
        column: with the labels, if it cannot be told.
        names: of the classes, where labels are bare numbers.

    Raises:
        ValueError: if the model does not know a label.
    """
    labels = find_labels(dataset, SINGLE, [column] if column else (), names, split)
    targets = labels.targets(dataset, split)
    known = {str(name): int(number) for name, number in model.config.label2id.items()}
    used = [labels.names[number] for number in targets.unique().tolist()]
    unknown = [name for name in used if name not in known]
    if unknown:
        some = ", ".join(sorted(known, key=known.get)[:5])
        raise ValueError(
            f"{split} has the label {unknown[0]!r}, which the model does not know; its labels are {some}. Evaluate "
            "with the dataset that it was trained for; if its labels are bare numbers, name them with --label_names as "
            "in the training."
        )
    table = torch.tensor([known.get(name, -1) for name in labels.names])
    return table[targets]


# -- through `evaluate` ---------------------------------------------------------------------------------------------


class TopAccuracy(evaluate.Metric):
    """Top-1 and top-5 from the scores of all classes, as an `evaluate` metric that needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="How often the label is the best, or one of the five best, of a classifier's classes.",
            citation="",
            inputs_description="predictions: scores of all classes; references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        return {"accuracy": top_k_accuracy(scores, labels, 1), "top5_accuracy": top_k_accuracy(scores, labels, 5)}


class ScoringEvaluator(ImageClassificationEvaluator):
    """
    The evaluator of "image-classification", which keeps the scores of all classes rather than the best class only.

    Args:
        num_labels: classes of the model.
        batch_size: pictures per forward pass.
    """

    def __init__(self, num_labels: int, batch_size: int):
        super().__init__("image-classification")
        self.PIPELINE_KWARGS = {"top_k": num_labels, "batch_size": batch_size, "function_to_apply": "softmax"}
        self.probabilities: np.ndarray | None = None  # of the last evaluation, (pictures, classes)

    def predictions_processor(self, predictions: list[list[dict]], label_mapping: dict[str, int]) -> dict:
        rows = [sorted(prediction, key=lambda answer: label_mapping[answer["label"]]) for prediction in predictions]
        self.probabilities = np.array([[answer["score"] for answer in row] for row in rows], dtype=np.float32)
        return {"predictions": self.probabilities.tolist()}


def evaluate_pictures(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    batch_size: int = 32,
) -> tuple[dict[str, float], np.ndarray]:
    """
    Top-1, top-5 and throughput through `evaluate` and a pipeline, decoding included.

    Returns:
        The numbers, and the probabilities (pictures, classes).
    """
    # the labels as the model numbers them, whatever the dataset calls and numbers them
    data = dataset.select_columns([column]).add_column("target", targets.tolist())
    evaluator = ScoringEvaluator(model.config.num_labels, batch_size)
    numbers = evaluator.compute(
        model_or_pipeline=model,
        feature_extractor=processor,
        data=data,
        metric=TopAccuracy(),
        input_column=column,
        label_column="target",
        label_mapping=model.config.label2id,
        device=model.device.index if model.device.type != "cpu" else -1,
    )
    return {name: float(value) for name, value in numbers.items()}, evaluator.probabilities


# -- damaged pictures -----------------------------------------------------------------------------------------------


def _noise(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    return (v2.gaussian_noise(pixels.float() / 255, sigma=strength) * 255).round().to(torch.uint8)


def _pixelate(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    height, width = pixels.shape[2:]
    small = v2.resize(pixels, [max(1, int(height * strength)), max(1, int(width * strength))], antialias=True)
    return v2.resize(small, [height, width], interpolation=InterpolationMode.NEAREST)


def _elastic(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    height, width = pixels.shape[2:]
    noise = 2 * torch.rand(1, 2, height, width) - 1
    smooth = v2.gaussian_blur(noise, kernel_size=[_odd(height / 4)] * 2, sigma=[height / 16] * 2)
    displacement = (smooth / smooth.abs().amax() * strength).permute(0, 2, 3, 1)
    return v2.elastic(pixels, displacement)


def _blur(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    sigma = strength * pixels.shape[3] / 224
    return v2.gaussian_blur(pixels, kernel_size=[_odd(6 * sigma)] * 2, sigma=[sigma] * 2)


def _jpeg(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    return torch.stack([v2.jpeg(picture, int(strength)) for picture in pixels])


def _odd(length: float) -> int:
    return max(3, int(length) // 2 * 2 + 1)


# Of uint8 (B, 3, H, W), with the strengths of severity 1 to 5. Noise, contrast, JPEG and pixelation have those of
# ImageNet-C (arXiv 1903.12261); the others are what torchvision has in their place.
CORRUPTIONS: dict[str, tuple[Callable[[torch.Tensor, float], torch.Tensor], tuple[float, ...]]] = {
    "gaussian noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "gaussian blur": (_blur, (1, 2, 3, 4, 6)),
    "brightness": (v2.adjust_brightness, (1.2, 1.5, 1.8, 2.1, 2.5)),
    "contrast": (v2.adjust_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "saturation": (v2.adjust_saturation, (0.5, 0.2, 0.0, 3.0, 6.0)),
    "pixelation": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "elastic": (_elastic, (0.01, 0.02, 0.04, 0.06, 0.1)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
}
PATCH_DROP, PATCH_SHUFFLE = "patch drop", "patch shuffle"


def shuffle_pieces(pixels: torch.Tensor, pieces: int) -> torch.Tensor:
    """Pictures (B, channels, H, W) cut into `pieces` x `pieces` parts, each put back in another place."""
    side = pixels.shape[2] // pieces
    parts = cut_into_units(pixels, side).flatten(1, 2)
    order = torch.rand(len(parts), pieces**2).argsort(dim=1)
    parts = parts[torch.arange(len(parts))[:, None], order].unflatten(1, (pieces, pieces))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def piece_counts(grid: int) -> list[int]:
    """Pieces per side that a grid of units can be cut into, the five finest at most."""
    return [count for count in range(2, grid + 1) if grid % count == 0][-len(SEVERITIES) :]


class Crops:
    """The transform of evaluations but for its last step: (channels, H, W), uint8, to be damaged, then normalised."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, picture) -> torch.Tensor:
        unscaled = self.processor(picture, return_tensors="pt", do_rescale=False, do_normalize=False)
        return unscaled["pixel_values"][0].round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def robustness(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """
    Top-1 with damaged pictures: kind of damage -> severity, share of units or pieces per side -> accuracy.

    Patch drop leaves units out of the network itself (`bool_masked_pos`); patch shuffle cuts the picture.
    """
    # an adapter wraps the network
    inner = next(module for module in model.modules() if isinstance(module, HiViTForImageClassification))
    config = inner.config
    mean, std = map(tuple, pixel_statistics(processor, config.num_channels))
    pictures = LabelledPictures(dataset, column, Crops(processor), targets, config.num_channels, name="eval")
    hits: dict[str, dict[str, float]] = {}

    def count(kind: str, strength, pixels: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None):
        inputs = normalize(pixels, mean, std).to(inner.device)
        mask = None if mask is None else mask.to(inner.device)
        predicted = inner(inputs, bool_masked_pos=mask).logits.argmax(dim=1).cpu()
        row = hits.setdefault(kind, {})
        row[str(strength)] = row.get(str(strength), 0) + (predicted == labels).sum().item()

    loader = DataLoader(pictures, batch_size=batch_size, collate_fn=Batches(0))
    with seeded(seed):
        for batch in tqdm(loader, desc="robustness", unit="batch", delay=2):
            pixels, labels = batch["pixel_values"], batch["labels"]
            count("none", 0, pixels, labels)
            for kind, (corrupt, strengths) in CORRUPTIONS.items():
                for severity in severities:
                    count(kind, severity, corrupt(pixels, strengths[severity - 1]), labels)
            grid = pixels.shape[2] // config.patch_size, pixels.shape[3] // config.patch_size
            units = grid[0] * grid[1]
            for severity in severities:
                dropped = min(int(units * DROPPED[severity - 1]), units - 1)
                mask = torch.rand(len(pixels), units).argsort(dim=1) < dropped
                count(PATCH_DROP, DROPPED[severity - 1], pixels, labels, mask)
            for pieces in piece_counts(grid[0]) if grid[0] == grid[1] else []:
                count(PATCH_SHUFFLE, pieces, shuffle_pieces(pixels, pieces), labels)
    return {kind: {strength: hit / len(pictures) for strength, hit in row.items()} for kind, row in hits.items()}


# -- soups ----------------------------------------------------------------------------------------------------------


def average_weights(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several models' weights, tensor by tensor."""
    return {name: torch.stack([state[name].float() for state in states]).mean(dim=0) for name in states[0]}


def soup(
    folders: Sequence[str], kind: str, accuracy: Callable[[PreTrainedModel, BaseImageProcessor], float]
) -> tuple[HiViTForImageClassification, BaseImageProcessor, dict]:
    """
    One classifier from several that were fine-tuned from the same start (arXiv 2203.05482).

    Args:
        folders: of the classifiers.
        kind: `"uniform"` averages all; `"greedy"` begins with the best and takes in each next one that does no harm.
        accuracy: of a classifier with held-out pictures and the image processor, for `"greedy"`.

    Returns:
        The classifier, its processor, and what was taken: `ingredients`, and for greedy the `accuracy` of each folder.

    Raises:
        ValueError: for fewer than two folders, and for classifiers of another network, other labels, or another image
            processor.
    """
    if len(folders) < 2:
        raise ValueError(f"A soup needs two folders or more, got {len(folders)}: give more --model_name_or_path.")
    models, processors = [], []
    for folder in folders:
        model, processor = load_for_evaluation(folder)
        if not isinstance(model, HiViTForImageClassification) or getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(f"{folder} is an adapter: a soup is made of whole classifiers.")
        if models:
            _check_same_network(models[0], model, folders[0], folder)
            _check_same_processor(processors[0], processor, folders[0], folder)
        models.append(model)
        processors.append(processor)
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    pot = models[0]
    if kind == "uniform":
        pot.load_state_dict(average_weights(states))
        return pot, processor, {"kind": kind, "ingredients": list(folders)}
    scores = {folder: accuracy(model, processor) for folder, model in zip(folders, models)}
    order = sorted(range(len(folders)), key=lambda index: -scores[folders[index]])
    taken, best = [order[0]], scores[folders[order[0]]]
    for index in order[1:]:
        pot.load_state_dict(average_weights([states[i] for i in [*taken, index]]))
        if (score := accuracy(pot, processor)) >= best:
            taken, best = [*taken, index], score
    pot.load_state_dict(average_weights([states[i] for i in taken]))
    return pot, processor, {"kind": kind, "ingredients": [folders[i] for i in taken], "accuracy": scores}


def _check_same_network(first, other, first_name: str, other_name: str):
    shapes = [{name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (first, other)]
    if shapes[0] != shapes[1] or first.config.id2label != other.config.id2label:
        raise ValueError(
            f"{first_name} and {other_name} have other networks or labels: a soup is made of classifiers that were "
            "fine-tuned from the same start with the same dataset."
        )


def _check_same_processor(first: BaseImageProcessor, other: BaseImageProcessor, first_name: str, other_name: str):
    settings = [_what_it_does(processor) for processor in (first, other)]
    for field, value in settings[0].items():
        if settings[1][field] != value:
            raise ValueError(
                f"{first_name} and {other_name} have image processors of another {field}, {value} and "
                f"{settings[1][field]}: a soup is made of classifiers that see pictures alike."
            )


def _what_it_does(processor: BaseImageProcessor) -> dict:
    """The settings of an image processor that change what a classifier sees; None where a step is left out."""
    steps = {"size": "do_resize", "resample": "do_resize", "crop_size": "do_center_crop"}
    steps |= {"rescale_factor": "do_rescale", "image_mean": "do_normalize", "image_std": "do_normalize"}
    known = json.loads(processor.to_json_string())
    return {field: known.get(field) if known.get(step) else None for field, step in steps.items()}


@torch.no_grad()
def accuracy_of(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    column: str,
    targets: torch.Tensor,
    batch_size: int = 64,
) -> float:
    """Top-1 of a classifier, without a pipeline."""
    channels = model.config.num_channels
    pictures = LabelledPictures(dataset, column, Evaluating(processor), targets, channels, name="eval")
    hits = 0
    for batch in DataLoader(pictures, batch_size=batch_size, collate_fn=Batches(0)):
        predicted = model(pixel_values=batch["pixel_values"].to(model.device)).logits.argmax(dim=1)
        hits += (predicted.cpu() == batch["labels"]).sum().item()
    return hits / len(pictures)
