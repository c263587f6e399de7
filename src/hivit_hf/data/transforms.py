# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Image transforms: random crops, augmentation, normalization, mixup and CutMix."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torchvision.transforms import v2
from transformers import BitImageProcessor

from .decoding import MAX_PIXELS, decode, decode_jpeg, open_image, upright_size
from .seeding import seed_of, seeded


_BICUBIC = v2.InterpolationMode.BICUBIC
MAX_SIDE_RATIO = 16  # of images that are resized as a whole before their center is cropped


@dataclass(frozen=True)
class RandomCrop:
    """
    The augmentation of the published pre-training: random resized crop and horizontal flip.

    Args:
        image_size: side of the result in px.
        crop_scale: lower and upper bound of the crop's area, as fractions of the image.
        flip_probability: of a horizontal flip.
        num_channels: 1, 3 or 4.
        max_pixels: larger images are refused.
        reduce_while_decoding: decode JPEG at 1/2, 1/4 or 1/8 where the crop is still as large as the result.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip_probability: float = 0.5
    num_channels: int = 3
    max_pixels: int = MAX_PIXELS
    reduce_while_decoding: bool = True

    def __call__(self, data: bytes, seed: int) -> torch.Tensor:
        """
        One crop, which depends on the bytes and the seed alone: (num_channels, image_size, image_size), uint8.

        Raises:
            UnreadableImageError: if no image can be made of the bytes.
        """
        image = open_image(data, self.max_pixels)
        full = upright_size(image)
        box, flip, factor = self.draw(image, seed)
        if image.format == "JPEG":
            pixels = decode_jpeg(data, image, self.num_channels, factor if self.reduce_while_decoding else 1)
        else:
            pixels = decode(image, self.num_channels)
        if tuple(pixels.shape[1:]) != full:
            box = _reduced(box, factor, pixels.shape[1:])
        size = [self.image_size, self.image_size]
        pixels = v2.functional.resized_crop(pixels, **box, size=size, interpolation=_BICUBIC, antialias=True)
        return v2.functional.horizontal_flip(pixels) if flip else pixels

    def draw(self, image: Image.Image, seed: int) -> tuple[dict[str, int], bool, int]:
        """The crop's box in the upright image, whether it is flipped, and the factor by which JPEG may be reduced."""
        with torch.random.fork_rng(devices=[]):  # `seeded` takes ten times as long, for Python and numpy
            torch.default_generator.manual_seed(seed)
            box = self._crop.make_params([torch.empty(1, *upright_size(image), device="meta")])
            flip = torch.rand(()).item() < self.flip_probability
        if image.format != "JPEG":
            return box, flip, 1
        reduction = min(box["height"], box["width"]) / self.image_size
        factor = next((f for f in (8, 4, 2) if reduction >= f), 1)
        # a box of whole pixels at either size
        return {name: length // factor * factor for name, length in box.items()}, flip, factor

    @cached_property
    def _crop(self) -> v2.RandomResizedCrop:
        return v2.RandomResizedCrop(self.image_size, self.crop_scale)


@dataclass(frozen=True)
class CenterCrop:
    """
    The crop of evaluations: the shorter side resized to `resize` px, then the center. Of an image that is longer than
    16 times its width only the middle is resized, so that it takes no more memory than others.
    """

    image_size: int
    resize: int
    num_channels: int = 3
    max_pixels: int = MAX_PIXELS

    def __call__(self, data: bytes, seed: int = 0) -> torch.Tensor:
        """(num_channels, image_size, image_size), uint8. Raises as `RandomCrop` does; the seed is ignored."""
        pixels = decode(open_image(data, self.max_pixels), self.num_channels)
        left, top, right, bottom = middle(pixels.shape[2], pixels.shape[1], self.image_size / self.resize)
        pixels = pixels[:, top:bottom, left:right]
        pixels = v2.functional.resize(pixels, [self.resize], interpolation=_BICUBIC, antialias=True)
        cropped = v2.functional.center_crop(pixels, [self.image_size, self.image_size])
        return cropped.clone(memory_format=torch.contiguous_format)  # a view would keep the whole image


def middle(width: int, height: int, crop_ratio: float) -> tuple[int, int, int, int]:
    """
    The box (left, top, right, bottom) of an image that is all a center crop can show: the image itself, unless one side
    is more than 16 times the other.

    Args:
        crop_ratio: the crop's side, as a fraction of the shorter side.
    """
    longest = max(MAX_SIDE_RATIO, math.ceil(2 * crop_ratio)) * min(width, height)
    left, top = (max(0, side - longest) // 2 for side in (width, height))
    return left, top, width - left, height - top


def _reduced(box: dict[str, int], factor: int, size: tuple[int, int]) -> dict[str, int]:
    """The box in an image of `size` that was decoded smaller by `factor`."""
    top, left = min(box["top"] // factor, size[0] - 1), min(box["left"] // factor, size[1] - 1)
    height, width = min(box["height"] // factor, size[0] - top), min(box["width"] // factor, size[1] - left)
    return {"top": top, "left": left, "height": height, "width": width}


def normalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, channels, H, W) to float32 with mean 0 and standard deviation 1 per channel, on the pixels' device."""
    mean_255, std_255 = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) * 255 for values in (mean, std))
    return torch.sub(pixels, mean_255).div_(std_255)


def denormalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The inverse of `normalize`, with values in [0, 1] where the image had them."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (mean, std))
    return pixels * std + mean


class EvaluationTransform:
    """
    The transform of evaluations, from a PIL image to (channels, H, W): the image processor saved with the model. Where
    it crops the center, only the middle of images that are longer than 16 times their width is resized.
    """

    def __init__(self, processor: BitImageProcessor):
        self.processor = processor
        shortest, crop = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
        self.crop_ratio = None
        if getattr(processor, "do_center_crop", False) and "shortest_edge" in shortest and "height" in crop:
            self.crop_ratio = max(crop["height"], crop["width"]) / shortest["shortest_edge"]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self.crop_ratio is not None:
            box = middle(*image.size, self.crop_ratio)
            image = image if box == (0, 0, *image.size) else image.crop(box)
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def training_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    crop_scale: Sequence[float],
    flip_probability: float,
    auto_augment: str | None,
    color_jitter: float,
    random_erasing: float,
    rotation_degrees: float = 0.0,
) -> Callable:
    """
    timm's training transform, as the published fine-tuning uses it: random resized crop (bicubic) and flip, an
    augmentation policy or color jitter, then random erasing. The crop may be rotated by a random angle.

    Raises:
        ValueError: if the policy cannot be read.
    """
    try:
        transform = create_transform(
            image_size,
            is_training=True,
            scale=tuple(crop_scale),
            hflip=flip_probability,
            auto_augment=auto_augment,
            color_jitter=color_jitter or None,
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"auto_augment {auto_augment!r} is no policy: try rand-m9-mstd0.5-inc1.") from error
    if rotation_degrees:
        transform.transforms.insert(1, v2.RandomRotation(rotation_degrees, v2.InterpolationMode.BILINEAR))
    return transform


class ClassificationCollator:
    """
    Data collator of classifiers, with mixup, CutMix and label smoothing: `pixel_values` (B, channels, H, W), and
    `labels` as the items have them. Items with a `seed` are training images: their class numbers may become
    probabilities (B, classes), whose rows add up to one. The mixing depends on these seeds alone.

    Args:
        num_classes: of the model; not needed for evaluations.
        mixup, cutmix: alphas, 0 for none; as timm's `Mixup` in batch mode.
        probability: fraction of the batches that are mixed.
        switch_probability: fraction of the mixed batches with CutMix rather than mixup.
        label_smoothing: fraction of the target that is spread over all classes.
    """

    def __init__(
        self,
        num_classes: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        probability: float = 1.0,
        switch_probability: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.mix = None
        if mixup or cutmix:
            self.mix = Mixup(
                mixup, cutmix, None, probability, switch_probability, "batch", True, label_smoothing, num_classes
            )

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Raises ValueError for an odd number of items that shall be mixed: they are mixed in pairs."""
        batch = {"pixel_values": torch.stack([item["pixel_values"] for item in items])}
        if "labels" not in items[0]:
            return batch
        labels = torch.stack([item["labels"] for item in items])
        if "seed" in items[0]:
            if self.mix is not None:
                if len(items) % 2:
                    raise ValueError(
                        f"mixup and cutmix mix images in pairs, got a batch of {len(items)}: make it even."
                    )
                with seeded(seed_of(*(item["seed"] for item in items))):
                    batch["pixel_values"], labels = self.mix(batch["pixel_values"], labels)
            elif self.label_smoothing:
                one_hot = torch.nn.functional.one_hot(labels, self.num_classes)
                labels = one_hot * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return batch | {"labels": labels}
