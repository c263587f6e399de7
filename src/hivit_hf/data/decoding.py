# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From the bytes of an image file to pixels: opening, EXIF orientation, decoding."""

import warnings
from pathlib import Path

import simplejpeg
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from ..image_reading import LevelsError, open_file, to_eight_bits


MAX_PIXELS = 178_956_970  # PIL's own limit
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of PIL, by the number of channels
_EXIF_ORIENTATION, _SWAPPED_SIDES = 0x0112, (5, 6, 7, 8)


class UnreadableImageError(ValueError):
    """Bytes that cannot be decoded to an image; the message says why."""


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """
    The first frame of an image, its header read and nothing decoded yet.

    Raises:
        UnreadableImageError: if there are no bytes, they are no image of the formats that are read
            (`image_reading.FORMATS`), or it has more than `max_pixels`.
    """
    if not data:
        raise UnreadableImageError("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size, which is checked here
            image = open_file(data)
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"decompression bomb: more than {max_pixels} pixels") from error
    except Exception as error:  # the many decoders raise many things
        raise UnreadableImageError(f"no image: {error}") from error
    if image.width * image.height > max_pixels:
        raise UnreadableImageError(f"decompression bomb: {image.width}x{image.height} is over {max_pixels} pixels")
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an image, 1 to 8; 1 is upright. Raises as `decode` does."""
    try:
        number = image.getexif().get(_EXIF_ORIENTATION)
    except Exception as error:  # in some formats it is behind the pixels, which are decoded then
        raise UnreadableImageError(f"damaged: {error}") from error
    return number if number in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an image once it is turned as its EXIF orientation says. Raises as `decode` does."""
    turned = orientation(image) in _SWAPPED_SIDES
    return (image.width, image.height) if turned else (image.height, image.width)


def upright(image: Image.Image, num_channels: int) -> Image.Image:
    """
    An opened image decoded and turned as its EXIF orientation says. Palette, CMYK and animated images are
    converted, 16-bit and floating-point ones as `to_eight_bits` does.

    Raises:
        UnreadableImageError: if it is truncated or otherwise damaged, or its values are out of range.
    """
    try:
        return to_eight_bits(ImageOps.exif_transpose(image)).convert(MODES[num_channels])
    except LevelsError as error:
        raise UnreadableImageError(str(error)) from error
    except Exception as error:
        raise UnreadableImageError(f"damaged: {error}") from error


def decode(image: Image.Image, num_channels: int) -> torch.Tensor:
    """As `upright`, as (num_channels, height, width), uint8. Raises as it does."""
    return v2.functional.pil_to_tensor(upright(image, num_channels))


def decode_jpeg(data: bytes, image: Image.Image, num_channels: int, factor: int) -> torch.Tensor:
    """
    As `decode`, smaller by `factor` (1, 2, 4 or 8): by libjpeg-turbo for an ordinary upright JPEG, which is faster and
    within a level of PIL's result on average, otherwise by PIL.
    """
    colors = {"RGB": "RGB", "L": "GRAY"}.get(MODES[num_channels])
    if colors and image.mode in ("RGB", "L") and image.getexif().get(_EXIF_ORIENTATION, 1) == 1:
        smallest = {"min_height": -(-image.height // factor), "min_width": -(-image.width // factor)}
        try:
            pixels = simplejpeg.decode_jpeg(data, colors, **smallest)
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except ValueError:
            pass  # PIL says what is wrong, or can read it nevertheless
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return decode(image, num_channels)


def image_of(example: dict, column: str) -> tuple[bytes, str]:
    """The encoded bytes of an image, and its path, or its tar and key, for messages."""
    value = example[column]
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UnreadableImageError(f"{path}: {error.strerror}") from error
    if "__key__" in example:
        return data or b"", f"{Path(example.get('__url__', '')).name}/{example['__key__']}"
    return data or b"", str(path or "")
