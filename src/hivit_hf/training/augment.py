# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From the bytes of a picture file to a crop: decoded no larger than needed, the same wherever it is read."""

import io
import warnings
from dataclasses import dataclass
from functools import cached_property

import simplejpeg
import torch
import xxhash
from PIL import Image, ImageOps
from torchvision.transforms import v2

from ..handler import LevelsError, to_eight_bits


MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, by the number of channels
_BICUBIC = v2.InterpolationMode.BICUBIC
_EXIF_ORIENTATION, _SWAPPED_SIDES = 0x0112, (5, 6, 7, 8)


class UnreadablePictureError(ValueError):
    """Bytes that no picture can be made of; the message says why."""


def seed_of(*parts: int | str) -> int:
    """A number in [0, 2**63) that depends on the parts alone, in every process and every run."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 1


def open_picture(data: bytes, max_pixels: int) -> Image.Image:
    """
    The first frame of a picture, its header read and nothing decoded yet.

    Raises:
        UnreadablePictureError: if there are no bytes, they are no picture, or it has more than `max_pixels`.
    """
    if not data:
        raise UnreadablePictureError("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size, which is checked here
            picture = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise UnreadablePictureError(f"decompression bomb: more than {max_pixels} pixels") from error
    except Exception as error:  # the many decoders raise many things
        raise UnreadablePictureError(f"no picture: {error}") from error
    if picture.width * picture.height > max_pixels:
        raise UnreadablePictureError(
            f"decompression bomb: {picture.width}x{picture.height} is over {max_pixels} pixels"
        )
    return picture


def orientation(picture: Image.Image) -> int:
    """How the EXIF data of a picture say that it lies, 1 to 8; 1 is upright. Raises as `decode` does."""
    try:
        number = picture.getexif().get(_EXIF_ORIENTATION)
    except Exception as error:  # of some formats it lies behind the pixels, which are decoded then
        raise UnreadablePictureError(f"damaged: {error}") from error
    return number if number in range(1, 9) else 1


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Height and width of a picture once it is turned as its EXIF orientation says. Raises as `decode` does."""
    turned = orientation(picture) in _SWAPPED_SIDES
    return (picture.width, picture.height) if turned else (picture.height, picture.width)


def upright(picture: Image.Image, num_channels: int) -> Image.Image:
    """
    An opened picture decoded and turned as its EXIF orientation says. Palette, CMYK and animated pictures are
    converted, 16-bit and floating-point ones as `to_eight_bits` does.

    Raises:
        UnreadablePictureError: if it is truncated or otherwise damaged, or its numbers are none of a picture.
    """
    try:
        return to_eight_bits(ImageOps.exif_transpose(picture)).convert(MODES[num_channels])
    except LevelsError as error:
        raise UnreadablePictureError(str(error)) from error
    except Exception as error:
        raise UnreadablePictureError(f"damaged: {error}") from error


def decode(picture: Image.Image, num_channels: int) -> torch.Tensor:
    """As `upright`, as (num_channels, height, width), uint8. Raises as it does."""
    return v2.functional.pil_to_tensor(upright(picture, num_channels))


def decode_jpeg(data: bytes, picture: Image.Image, num_channels: int, factor: int) -> torch.Tensor:
    """
    As `decode`, smaller by `factor` (1, 2, 4 or 8): by libjpeg-turbo for an ordinary upright JPEG, which is faster and
    within a level of PIL's result on average, otherwise by PIL.
    """
    colors = {"RGB": "RGB", "L": "GRAY"}.get(MODES[num_channels])
    if colors and picture.mode in ("RGB", "L") and picture.getexif().get(_EXIF_ORIENTATION, 1) == 1:
        smallest = {"min_height": -(-picture.height // factor), "min_width": -(-picture.width // factor)}
        try:
            pixels = simplejpeg.decode_jpeg(data, colors, **smallest)
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except ValueError:
            pass  # PIL says what is wrong, or can read it nevertheless
    if factor > 1:
        picture.draft(None, (picture.width // factor, picture.height // factor))
    return decode(picture, num_channels)


@dataclass(frozen=True)
class RandomCrop:
    """
    The augmentation of the published pre-training: a crop of random place, size and shape, and a flip.

    Args:
        image_size: side of the result in px.
        crop_scale: smallest and largest share of the picture that a crop covers.
        flip_probability: of a horizontal flip.
        num_channels: 1, 3 or 4.
        max_pixels: larger pictures are refused.
        reduce_while_decoding: decode JPEG at 1/2, 1/4 or 1/8 where the crop is still as large as the result.
    """

    image_size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip_probability: float = 0.5
    num_channels: int = 3
    max_pixels: int = 178_956_970
    reduce_while_decoding: bool = True

    def __call__(self, data: bytes, seed: int) -> torch.Tensor:
        """
        One crop, which depends on the bytes and the seed alone: (num_channels, image_size, image_size), uint8.

        Raises:
            UnreadablePictureError: if no picture can be made of the bytes.
        """
        picture = open_picture(data, self.max_pixels)
        full = upright_size(picture)
        box, flip, factor = self.draw(picture, seed)
        if picture.format == "JPEG":
            pixels = decode_jpeg(data, picture, self.num_channels, factor if self.reduce_while_decoding else 1)
        else:
            pixels = decode(picture, self.num_channels)
        if tuple(pixels.shape[1:]) != full:
            box = _reduced(box, factor, pixels.shape[1:])
        size = [self.image_size, self.image_size]
        pixels = v2.functional.resized_crop(pixels, **box, size=size, interpolation=_BICUBIC, antialias=True)
        return v2.functional.horizontal_flip(pixels) if flip else pixels

    def draw(self, picture: Image.Image, seed: int) -> tuple[dict[str, int], bool, int]:
        """The box of the crop in the upright picture, whether it is flipped, and by what JPEG may be reduced."""
        before = torch.default_generator.get_state()
        try:
            torch.default_generator.manual_seed(seed)
            box = self._crop.make_params([torch.empty(1, *upright_size(picture), device="meta")])
            flip = torch.rand(()).item() < self.flip_probability
        finally:
            torch.default_generator.set_state(before)
        if picture.format != "JPEG":
            return box, flip, 1
        reduction = min(box["height"], box["width"]) / self.image_size
        factor = next((f for f in (8, 4, 2) if reduction >= f), 1)
        # a box of whole pixels at either size
        return {name: length // factor * factor for name, length in box.items()}, flip, factor

    @cached_property
    def _crop(self) -> v2.RandomResizedCrop:
        return v2.RandomResizedCrop(self.image_size, self.crop_scale)


@dataclass(frozen=True)
class CentreCrop:
    """What evaluation looks at: the shorter side resized to `resize`, then the middle."""

    image_size: int
    resize: int
    num_channels: int = 3
    max_pixels: int = 178_956_970

    def __call__(self, data: bytes, seed: int = 0) -> torch.Tensor:
        """(num_channels, image_size, image_size), uint8. Raises as `RandomCrop` does; the seed has no meaning."""
        pixels = decode(open_picture(data, self.max_pixels), self.num_channels)
        pixels = v2.functional.resize(pixels, [self.resize], interpolation=_BICUBIC, antialias=True)
        return v2.functional.center_crop(pixels, [self.image_size, self.image_size])


def _reduced(box: dict[str, int], factor: int, size: tuple[int, int]) -> dict[str, int]:
    """The box in a picture of `size` that was decoded smaller by `factor`."""
    top, left = min(box["top"] // factor, size[0] - 1), min(box["left"] // factor, size[1] - 1)
    height, width = min(box["height"] // factor, size[0] - top), min(box["width"] // factor, size[1] - left)
    return {"top": top, "left": left, "height": height, "width": width}


def normalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """uint8 (B, channels, H, W) to float32 with mean 0 and deviation 1 per channel, on whatever device it is."""
    mean_255, std_255 = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) * 255 for values in (mean, std))
    return torch.sub(pixels, mean_255).div_(std_255)


def denormalize(pixels: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """The inverse of `normalize`, with values in [0, 1] where the picture had them."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, -1, 1, 1) for values in (mean, std))
    return pixels * std + mean
