"""Segmentation data: maps as they are read and refused, random crops."""

import io
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from hivit_hf.data.seeding import seeded
from hivit_hf.segmentation.data import SegmentationDataset, TrainingCrop, WholeImage
from hivit_hf.segmentation.metrics import IGNORE_INDEX


def samples(maps: list, do_reduce_labels: bool = False, ids: bool = True, size=(6, 8)) -> SegmentationDataset:
    features = {"image": Image(), "annotation": Image()} | ({"image_id": Value("string")} if ids else {})
    rows = {"image": [np.zeros((*size, 3), dtype=np.uint8)] * len(maps), "annotation": maps}
    rows |= {"image_id": [f"view_{i}" for i in range(len(maps))]} if ids else {}
    dataset = Dataset.from_dict(rows, features=Features(features))
    transform = WholeImage([0.5] * 3, [0.5] * 3)
    return SegmentationDataset(dataset, "image", "annotation", transform, 3, do_reduce_labels)


def test_maps_are_read_as_they_are_or_counted_from_one():
    numbers = np.zeros((6, 8), dtype=np.uint8)
    numbers[0], numbers[1], numbers[2] = 1, 2, 255
    plain = samples([numbers])[0]
    assert plain["pixel_values"].shape == (3, 6, 8) and plain["pixel_values"].unique().tolist() == [-1.0]
    assert np.array_equal(plain["labels"].numpy(), numbers)
    numbers[3] = 3
    _, reduced = samples([numbers], do_reduce_labels=True).sample(0)
    assert reduced[:, 0].tolist() == [0, 1, IGNORE_INDEX, 2, IGNORE_INDEX, IGNORE_INDEX]
    palette_image = PILImage.fromarray(numbers % 3).convert("P")
    palette_image.putpalette([10, 200, 30] * 256)
    sixteen_bits = PILImage.fromarray((numbers % 3).astype(np.uint16))
    for image in (palette_image, sixteen_bits):
        assert np.array_equal(samples([image]).sample(0)[1], numbers % 3)


def file_with_orientation(pixels: np.ndarray, exif_orientation: int | None) -> dict:
    """A PNG file with an EXIF orientation."""
    exif, file = PILImage.Exif(), io.BytesIO()
    if exif_orientation is not None:
        exif[0x0112] = exif_orientation
    PILImage.fromarray(pixels).save(file, "png", exif=exif)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("turn", [3, 6])
def test_images_and_maps_are_rotated_together_or_refused(turn):
    numbers = np.zeros((6, 8), dtype=np.uint8)
    numbers[0, 0] = 1  # the corner that the image marks too
    pixels = np.repeat(numbers[:, :, None] * 255, 3, axis=2)

    def images(image_orientation, map_orientation) -> SegmentationDataset:
        features = Features({"image": Image(), "annotation": Image(), "image_id": Value("string")})
        files = {
            "image": file_with_orientation(pixels, image_orientation),
            "annotation": file_with_orientation(numbers, map_orientation),
        }
        row = {name: [file] for name, file in files.items()} | {"image_id": ["view"]}
        transform = WholeImage([0.5] * 3, [0.5] * 3)
        return SegmentationDataset(Dataset.from_dict(row, features=features), "image", "annotation", transform, 3)

    for image_orientation, map_orientation in ((turn, turn), (1, None)):
        image, read = images(image_orientation, map_orientation).sample(0)
        assert np.array_equal(np.asarray(image)[:, :, 0] // 255, read) and read.sum() == 1
        assert read[0, 0] == (image_orientation == 1)
    for image_orientation, map_orientation in ((turn, None), (turn, 1), (None, turn)):
        sentence = f"of sample 0 of train (view) is {image_orientation or 1} and that of its map {map_orientation or 1}"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            images(image_orientation, map_orientation).check(0)


def test_bad_samples_are_named():
    good = np.ones((6, 8), dtype=np.uint8)
    cases = [
        (good[:5], "map of sample 1 of train (view_1) is 8x5 px and its image 8x6"),
        (good * 7, "map of sample 1 of train (view_1) has the class 7, but there are 3 classes, 0 to 2"),
        (good * 255, "map of sample 1 of train (view_1) has no labeled pixel"),
        (np.ones((6, 8, 3), dtype=np.uint8), "map of sample 1 of train (view_1) has 3 channels (RGB)"),
    ]
    for bad, sentence in cases:
        images = samples([good, bad])
        images.check(0)
        for touch in (images.check, images.__getitem__):
            with pytest.raises(ValueError, match=re.escape(sentence)):
                touch(1)
    with pytest.raises(ValueError, match="has the class 4, but there are 3 classes, 1 to 3"):
        samples([good * 4], do_reduce_labels=True).check(0)
    with pytest.raises(ValueError, match="map of sample 0 of train has no labeled pixel"):
        samples([good * 0], do_reduce_labels=True, ids=False).check(0)
    broken = samples([good])
    broken.maps = broken.maps.map(lambda row: {"annotation": {"bytes": b"nonsense", "path": None}})
    with pytest.raises(ValueError, match=r"map of sample 0 of train \(view_0\) cannot be read"):
        broken.check(0)


def painted(height: int, width: int) -> tuple[PILImage.Image, np.ndarray]:
    """A map of large blocks, and the image that shows each class as its own gray."""
    blocks = np.random.default_rng(1).integers(0, 5, (height // 20 + 1, width // 20 + 1))
    numbers = np.kron(blocks, np.ones((20, 20), dtype=np.int64))[:height, :width]
    return PILImage.fromarray(np.repeat((numbers * 50).astype(np.uint8)[:, :, None], 3, axis=2)), numbers


@pytest.mark.parametrize(("height", "width"), [(90, 130), (200, 70), (40, 48)])
def test_image_and_map_are_cropped_scaled_and_flipped_alike(height, width):
    crop = TrainingCrop(64, [0.0] * 3, [1.0] * 3, (0.5, 2.0), 0.9, 0.5, photometric=False)
    image, numbers = painted(height, width)
    flipped = set()
    for seed in range(20):
        with seeded(seed):
            pixel_values, labels = crop(image, numbers)
        assert pixel_values.shape == (3, 64, 64) and labels.shape == (64, 64) and labels.dtype == torch.int64
        labeled = labels != IGNORE_INDEX
        assert labeled.any() and not pixel_values[:, ~labeled].any()
        shown = (pixel_values[0] * 255 / 50).round().long()
        # borders between blocks are blurred in the image and sharp in the map
        assert (shown == labels)[labeled].float().mean() > 0.85
        with seeded(seed):
            again = crop(image, numbers)
        assert torch.equal(again[0], pixel_values) and torch.equal(again[1], labels)
        flipped.add(bool(labeled.all()) and bool((labels != labels.flip(1)).any()))
    assert True in flipped or height < 64


def test_crops_without_scaling_are_exact_and_cover_the_image():
    image, numbers = painted(90, 130)
    crop = TrainingCrop(64, [0.0] * 3, [1.0] * 3, (90 / 64, 90 / 64), 1.0, 0.0, photometric=False)
    seen = set()
    for seed in range(20):
        with seeded(seed):
            pixel_values, labels = crop(image, numbers)
        assert torch.equal((pixel_values[0] * 255 / 50).round().long(), labels)
        seen.add(labels.numpy().tobytes())
    assert len(seen) > 10
    mirrored = TrainingCrop(64, [0.0] * 3, [1.0] * 3, (90 / 64, 90 / 64), 1.0, 1.0, photometric=False)
    with seeded(0):
        plain = crop(image, numbers)
    with seeded(0):
        mirror = mirrored(image, numbers)
    assert torch.equal(plain[0].flip(2), mirror[0]) and torch.equal(plain[1].flip(1), mirror[1])


def test_a_crop_holds_labeled_pixels_and_avoids_too_much_of_one_class():
    image, numbers = painted(120, 400)
    rare = np.full_like(numbers, IGNORE_INDEX)
    rare[117, 391] = 1
    crop = TrainingCrop(32, [0.0] * 3, [1.0] * 3, (0.5, 4.0), 0.75, 0.5, photometric=False)
    for seed in range(30):
        with seeded(seed):
            assert (crop(image, rare)[1] == 1).any()
    mostly = np.zeros_like(numbers)
    mostly[:, 300:] = 1
    fractions = {}
    for most in (0.75, 1.0):
        crop = TrainingCrop(100, [0.0] * 3, [1.0] * 3, (1.2, 1.2), most, 0.5, photometric=False)
        labels = []
        for seed in range(30):
            with seeded(seed):
                labels.append(crop(image, mostly)[1].float().mean())
        fractions[most] = sum(0.25 <= fraction <= 0.75 for fraction in labels)
    assert fractions[0.75] > 2 * fractions[1.0]


def test_photometric_distortion_changes_images_and_no_maps():
    image, numbers = painted(64, 64)
    crops = []
    for photometric in (False, True):
        with seeded(1):
            crops.append(TrainingCrop(64, [0.0] * 3, [1.0] * 3, (1, 1), 1.0, 0.0, photometric)(image, numbers))
    assert torch.equal(crops[0][1], crops[1][1]) and not torch.equal(crops[0][0], crops[1][0])
