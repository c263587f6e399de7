# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Image files of the formats that are read, images of more than 8 bits, and the image processor that a model was saved
with.

This file travels to the Hub beside `handler.py`: it imports nothing of the package.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import BitImageProcessor
from transformers.image_processing_utils import BaseImageProcessor


# Pillow's decoders of other formats are tried less, and some start programs, as Ghostscript for EPS
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")


class FormatError(ValueError):
    """Bytes that are no image of the formats that are read."""


class LevelsError(ValueError):
    """Pixel values of an image whose white level is unknown."""


def open_file(data: bytes) -> Image.Image:
    """
    The image of a file's bytes, its header read and nothing decoded yet. The one place that opens image files.

    Raises:
        FormatError: if they are none of `FORMATS`.
        Exception: whatever the decoders stumble over.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise FormatError("it is no JPEG, PNG, GIF, WebP, BMP or TIFF file that can be read") from error


def check_format(image: Image.Image):
    """FormatError if somebody else opened a file that is none of `FORMATS`; decoding it may start a program."""
    if image.format not in (*FORMATS, "MPO", None):  # MPO: a JPEG of several images; None: of no file
        raise FormatError(f"its format is {image.format}, not JPEG, PNG, GIF, WebP, BMP or TIFF")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """
    A gray image of more than 8 bits with 8, from black to white; `convert` would clip it. Integers are of 16 bits,
    floats range from 0 to 1 or, if larger ones are among them, to 255. Other images come back as they are.

    Raises:
        LevelsError: if there are larger or negative values, or NaN.
    """
    if image.mode.startswith("I;16"):
        image = image.convert("I")
    if image.mode not in ("I", "F"):
        return image
    if image.mode == "F" and np.isnan(np.asarray(image)).any():  # the extrema leave them out
        raise LevelsError("some of its values are no numbers (NaN)")
    low, high = image.getextrema()
    white = 65535 if image.mode == "I" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= white:
        raise LevelsError(f"its values range from {low:g} to {high:g}, not from 0 to {white}")
    scale = 255 / white
    gray = image.point(lambda level: level * scale + 0.5).convert("L")
    if isinstance(image.info.get("transparency"), int):
        gray.info["transparency"] = round(image.info["transparency"] * scale)
    return gray


def read_processor(source: str | Path, revision: str | None = None) -> BaseImageProcessor:
    """
    The image processor that a model was saved with, of the class that its `preprocessor_config.json` names.

    Args:
        source: folder of the model, or its repository on the Hub.
        revision: of the repository.

    Raises:
        ValueError: if it names a class that transformers does not have, or one for anything but images.
        OSError: if there is no such file, or it is no JSON.
    """
    content = BitImageProcessor.get_image_processor_dict(source, revision=revision)[0]
    name = content.get("image_processor_type", "BitImageProcessor")
    if name.removesuffix("Fast") == "BitImageProcessor":  # by itself: some versions' Auto class needs torchvision
        return BitImageProcessor.from_pretrained(source, revision=revision)
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever the class stumbles over
        processor = error
    if not isinstance(processor, BaseImageProcessor):
        raise ValueError(
            f"{source} names the image processor {name}, which transformers does not have or cannot use here: save a "
            "BitImageProcessor that does the same."
        ) from (processor if isinstance(processor, Exception) else None)
    return processor
