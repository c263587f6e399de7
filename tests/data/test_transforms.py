"""Center crops: of ordinary images, and of long and thin ones, whose memory is bounded."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from hivit_hf.data.decoding import decode, open_image
from hivit_hf.data.transforms import CenterCrop, EvaluationTransform
from hivit_hf.image_processing import evaluation_processor
from measure import peak_allocated_mib


BICUBIC = v2.InterpolationMode.BICUBIC


def photo(width: int, height: int) -> bytes:
    """A PNG that changes slowly: by 2 levels from a pixel to the next one at most."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    gray = 127 + 60 * np.sin(columns / 40) + 60 * np.cos(rows / 60)
    file = io.BytesIO()
    Image.fromarray(gray.astype(np.uint8)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def resized_as_a_whole(data: bytes, image_size: int, resize: int) -> torch.Tensor:
    pixels = decode(open_image(data, 10**8), 3)
    pixels = v2.functional.resize(pixels, [resize], interpolation=BICUBIC, antialias=True)
    return v2.functional.center_crop(pixels, [image_size, image_size])


@pytest.mark.parametrize("size", [(50, 40), (41, 97), (30, 480), (480, 30), (31, 495), (1, 16), (7, 3)])
@pytest.mark.parametrize("sizes", [(32, 36), (32, 32), (40, 32)])
def test_ordinary_images_are_resized_as_a_whole(size, sizes):
    data = photo(*size)
    assert_close(CenterCrop(*sizes)(data), resized_as_a_whole(data, *sizes), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(900, 40), (40, 900), (901, 40), (1000, 33), (33, 777)])
def test_of_long_images_the_same_middle_is_cropped(size):
    """Within a pixel, as the longer side is rounded to whole ones."""
    data = photo(*size)
    difference = CenterCrop(32, 36)(data).float() - resized_as_a_whole(data, 32, 36).float()
    assert difference.abs().max() <= 3
    processor = evaluation_processor(32)
    image = Image.open(io.BytesIO(data))
    whole = processor(image, return_tensors="pt").pixel_values[0]
    assert (EvaluationTransform(processor)(image) - whole).abs().max() <= 0.06  # 3 levels of 255


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)])
def test_thin_images_take_no_more_memory_than_others(size):
    data = photo(*size)
    crop, transform = CenterCrop(224, 256), EvaluationTransform(evaluation_processor(224))
    assert peak_allocated_mib(lambda: crop(data)) < 60
    assert crop(data).untyped_storage().nbytes() == 3 * 224 * 224
    assert peak_allocated_mib(lambda: transform(Image.open(io.BytesIO(data)))) < 60


def test_crops_keep_nothing_alive_but_themselves():
    assert CenterCrop(32, 36)(photo(300, 40)).untyped_storage().nbytes() == 3 * 32 * 32
