# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Robustness of classifiers: corruptions (ImageNet-C), patch drop, patch shuffle."""

from collections.abc import Callable, Sequence

import datasets
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.datasets import ImageDataset
from ..data.seeding import seeded
from ..data.transforms import ClassificationCollator, EvaluationTransform, normalize
from ..image_processing import pixel_statistics
from ..modeling_hivit import HiViTForImageClassification, cut_into_units


SEVERITIES = (1, 2, 3, 4, 5)
DROPPED = (0.1, 0.3, 0.5, 0.7, 0.9)  # fraction of the units that are masked, by severity


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
    return torch.stack([v2.jpeg(image, int(strength)) for image in pixels])


def _odd(length: float) -> int:
    return max(3, int(length) // 2 * 2 + 1)


# Functions of uint8 (B, 3, H, W), and their strengths at severity 1 to 5. Noise, contrast, JPEG and pixelation have
# those of ImageNet-C (arXiv 1903.12261); the others are torchvision's closest.
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


def shuffle_patches(pixels: torch.Tensor, pieces: int) -> torch.Tensor:
    """Images (B, channels, H, W) cut into `pieces` x `pieces` patches, which are shuffled."""
    side = pixels.shape[2] // pieces
    parts = cut_into_units(pixels, side).flatten(1, 2)
    order = torch.rand(len(parts), pieces**2).argsort(dim=1)
    parts = parts[torch.arange(len(parts))[:, None], order].unflatten(1, (pieces, pieces))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def shuffle_grids(grid: int) -> list[int]:
    """Numbers of patches per side into which a grid of units can be cut, the five finest at most."""
    return [count for count in range(2, grid + 1) if grid % count == 0][-len(SEVERITIES) :]


class UnnormalizedTransform(EvaluationTransform):
    """The transform of evaluations but for rescaling and normalization: (channels, H, W), uint8, to be corrupted."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        unscaled = self.processor(image, return_tensors="pt", do_rescale=False, do_normalize=False)
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
    Top-1 accuracy on corrupted images: corruption -> severity (fraction of masked units, patches per side) -> accuracy.

    Patch drop masks units in the network itself (`bool_masked_pos`); patch shuffle cuts the image.
    """
    # an adapter wraps the network
    inner = next(module for module in model.modules() if isinstance(module, HiViTForImageClassification))
    config = inner.config
    mean, std = map(tuple, pixel_statistics(processor, config.num_channels))
    images = ImageDataset(dataset, column, UnnormalizedTransform(processor), targets, config.num_channels, name="eval")
    hits: dict[str, dict[str, float]] = {}

    def count(kind: str, strength, pixels: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None):
        inputs = normalize(pixels, mean, std).to(inner.device)
        predicted = inner(inputs, bool_masked_pos=mask).logits.argmax(dim=1).cpu()
        row = hits.setdefault(kind, {})
        row[str(strength)] = row.get(str(strength), 0) + (predicted == labels).sum().item()

    loader = DataLoader(images, batch_size=batch_size, collate_fn=ClassificationCollator())
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
            for pieces in shuffle_grids(grid[0]) if grid[0] == grid[1] else []:
                count(PATCH_SHUFFLE, pieces, shuffle_patches(pixels, pieces), labels)
    return {kind: {strength: hit / len(images) for strength, hit in row.items()} for kind, row in hits.items()}
