# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Feature extraction from a frozen encoder, with a cache."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_hivit import HiViTConfig
from ..data.datasets import ImageDataset
from ..data.seeding import seeded
from ..data.transforms import ClassificationCollator, EvaluationTransform
from ..image_processing import evaluation_processor, find_processor
from ..modeling_hivit import HiViTModel
from ..training.initialization import normalization, read_config, reading_weights, silent_transformers


STAGES = ("stem", "stage1", "stage2", "stage3")
FUSED = "fused"  # stages 1 to 3 concatenated, as the published decoder reads them
FEATURES = (*STAGES, FUSED)


@dataclass(frozen=True)
class Encoder:
    """
    A frozen HiViT and its image processor.

    Args:
        processor: that of the model's folder, or the published evaluation transform.
        identity: hash of its weights and processor, the key of the cache.
    """

    model: HiViTModel
    processor: BaseImageProcessor
    identity: str


def load_encoder(name: str, image_size: int | None = None, random_weights: bool = False) -> Encoder:
    """
    The encoder of a pre-trained model or classifier, on the accelerator if there is one.

    Args:
        name: a folder, or a repository of the Hub.
        image_size: side of the images in px; the model's if not given. With another one the images go through the
            published transform, as in fine-tuning, with mean and standard deviation of the folder's processor.
        random_weights: random initialization instead of the trained weights: the baseline for features.

    Raises:
        ValueError: if there is no HiViT, or an image processor that cannot be used.
    """
    config = read_config(name)
    if random_weights:
        with seeded(0):
            model = HiViTModel(config, add_pooling_layer=False)
    else:
        with reading_weights(name):
            model = HiViTModel.from_pretrained(name, add_pooling_layer=False, dtype=torch.float32)
    processor = _processor(name, config, image_size)
    digest = hashlib.sha256(json.dumps(processor.to_dict(), default=str, sort_keys=True).encode())
    for key, tensor in model.state_dict().items():
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return Encoder(
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu").eval(),
        processor,
        digest.hexdigest(),
    )


def _processor(name: str, config: HiViTConfig, image_size: int | None) -> BaseImageProcessor:
    """The folder's image processor, for images of the model's size; else the published one."""
    size = config.image_size if image_size is None else image_size
    with silent_transformers():
        found = find_processor(name)
    if found is not None and size == config.image_size:
        return found
    if not isinstance(size, int):
        raise ValueError(f"The network sees {size} px: give one --image_size for square images.")
    if size < 1 or size % config.patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size {config.patch_size}, got {size}.")
    return evaluation_processor(size, *normalization(name, config.num_channels))


@torch.no_grad()
def stage_features(model: HiViTModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean over the tokens of the embedding and of each stage, and stages 1 to 3 concatenated: (B, channels) each."""
    stages = model(pixel_values, output_stage_hidden_states=True).stage_hidden_states
    means = dict(zip(STAGES, (stage.flatten(1, -2).mean(dim=1).float() for stage in stages)))
    return means | {FUSED: torch.cat([means[name] for name in STAGES[1:]], dim=1)}


def extract(
    encoder: Encoder, dataset: Dataset, column: str, batch_size: int = 64, num_workers: int = 0, name: str = "images"
) -> dict[str, torch.Tensor]:
    """
    Features of all images, on the CPU: name of `FEATURES` -> (images, channels), float32.

    Raises:
        ValueError: for an image that cannot be read, with its row and the `name` of the split.
    """
    channels = encoder.model.config.num_channels
    images = ImageDataset(dataset, column, EvaluationTransform(encoder.processor), num_channels=channels, name=name)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=ClassificationCollator())
    parts = []
    for batch in tqdm(loader, desc=f"features of {name}", unit="batch", delay=2):
        features = stage_features(encoder.model, batch["pixel_values"].to(encoder.model.device))
        parts.append({key: value.cpu() for key, value in features.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in FEATURES}


def cached_features(
    encoder: Encoder,
    dataset: Dataset,
    column: str,
    cache: Path,
    batch_size: int = 64,
    num_workers: int = 0,
    name: str = "",
) -> tuple[dict[str, torch.Tensor], bool]:
    """
    As `extract`, cached in a file whose name depends on the weights, the transform and the images.

    Returns:
        The features, and whether they came from the cache.
    """
    key = hashlib.sha256(f"{encoder.identity} {dataset._fingerprint} {column}".encode()).hexdigest()[:16]
    path = cache / f"{name}-{key}.safetensors"
    if path.exists():
        try:
            return load_file(path), True
        except SafetensorError as error:
            raise ValueError(f"The features in {path} cannot be read ({error}): delete the file.") from error
    features = extract(encoder, dataset, column, batch_size, num_workers, name)
    cache.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in features.items()}, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return features, False
