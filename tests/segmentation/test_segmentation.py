"""Segmentation: class maps, what is refused, images of any size, mean IoU, and whole runs by the command line."""

import io
import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import evaluate
import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value, load_from_disk
from PIL import Image as PILImage
from sklearn.metrics import jaccard_score, recall_score
from torch.testing import assert_close
from transformers import (
    AutoModelForSemanticSegmentation,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
    UperNetForSemanticSegmentation,
    pipeline,
)

import finetune_segmentation
from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.data.seeding import seeded
from hivit_hf.image_processing import IMAGENET_MEAN, IMAGENET_STD
from hivit_hf.segmentation.arguments import SegmentationRecipe
from hivit_hf.segmentation.data import IGNORED, MappedImages, TrainingCrop, WholeImage
from hivit_hf.segmentation.modeling import load_segmenter, new_segmenter, predict, share_batch_norms
from hivit_hf.segmentation.overlays import overlay, overlay_sheet, palette
from hivit_hf.segmentation.run import SegmentationRun
from hivit_hf.training import dense_old as dense
from hivit_hf.training.initialization import pyramid_start
from hivit_hf.training.optim import layer_table, layerwise_parameter_groups, poly_learning_rate
from hivit_hf.training.recipe_old import read_recipe
from scenes.data import map_names, scenes_dataset


EXAMPLES = Path(__file__).parents[2] / "examples"
MEAN_IOU = str(EXAMPLES / "metrics" / "mean_iou")
SCENES = EXAMPLES / "recipes" / "segmentation_scenes.yaml"
NETWORK = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SMALL = {"head_channels": 8, "auxiliary_channels": 8}
NAMES = ["sky", "earth", "sea"]


def start_folder(folder: Path, kind=HiViTForMaskedImageModeling, **changes) -> str:
    torch.manual_seed(3)
    kind(HiViTConfig(**{**NETWORK, **changes})).save_pretrained(folder)
    return str(folder)


# -- mean intersection over union -----------------------------------------------------------------------------------


def test_mean_iou_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    true = [generator.integers(0, 4, size) for size in ((7, 5), (4, 9))]
    guessed = [np.where(generator.random(t.shape) < 0.6, t, generator.integers(0, 4, t.shape)) for t in true]
    true[0][:2] = 255
    metric = evaluate.load(MEAN_IOU)
    scores = metric.compute(predictions=guessed, references=true, num_labels=5)
    # of the images one by one, as runs ask, it is the same
    assert metric.scores(sum(metric.counts(g, t, 5) for g, t in zip(guessed, true))) == scores
    flat_true, flat_guessed = (np.concatenate([maps.ravel() for maps in values]) for values in (true, guessed))
    labeled = flat_true != 255
    expected = jaccard_score(flat_true[labeled], flat_guessed[labeled], average=None)
    recall = recall_score(flat_true[labeled], flat_guessed[labeled], average=None)
    assert_close(scores["per_category_iou"][:4], expected.tolist())
    assert scores["per_category_iou"][4] is None and scores["per_category_accuracy"][4] is None
    assert_close(scores["mean_iou"], expected.mean().item())
    assert_close(scores["mean_accuracy"], recall.mean().item())
    assert_close(scores["overall_accuracy"], (flat_true == flat_guessed)[labeled].mean().item())


def test_mean_iou_by_hand():
    true, guessed = [[0, 0, 1, 1], [0, 0, 1, 9]], [[0, 0, 0, 1], [2, 0, 1, 1]]
    scores = evaluate.load(MEAN_IOU).compute(predictions=[guessed], references=[true], num_labels=3, ignore_index=9)
    assert scores["per_category_iou"] == [3 / 5, 2 / 3, 0.0]  # class 2 occurs in the prediction only
    assert scores["per_category_accuracy"] == [3 / 4, 2 / 3, None]


@pytest.mark.parametrize(
    ("guessed", "true", "sentence"),
    [
        ([[0, 1]], [[0, 1, 1]], "maps of image 0 differ in size"),
        ([[0, 3]], [[0, 1]], "have the class 3, but there are 3"),
        ([[0, 1]], [[255, 255]], "No pixel is labeled"),
    ],
)
def test_mean_iou_refuses(guessed, true, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate.load(MEAN_IOU).compute(predictions=[guessed], references=[true], num_labels=3)


def test_counts_of_mean_iou_refuse_negative_classes():
    metric, sound, negative = evaluate.load(MEAN_IOU), np.array([[0, 1]]), np.array([[0, -2]])
    for maps in ((sound, negative), (negative, sound)):
        with pytest.raises(ValueError, match="image 7 have the class -2, but there are 3, from 0 on"):
            metric.counts(*maps, 3, number=7)


# -- class maps -----------------------------------------------------------------------------------------------------


def mapped(maps: list, reduce_labels: bool = False, ids: bool = True, size=(6, 8), **keywords) -> MappedImages:
    features = {"image": Image(), "annotation": Image()} | ({"image_id": Value("string")} if ids else {})
    rows = {"image": [np.zeros((*size, 3), dtype=np.uint8)] * len(maps), "annotation": maps}
    rows |= {"image_id": [f"view_{i}" for i in range(len(maps))]} if ids else {}
    dataset = Dataset.from_dict(rows, features=Features(features))
    transform = WholeImage([0.5] * 3, [0.5] * 3)
    return MappedImages(dataset, "image", "annotation", transform, 3, reduce_labels, **keywords)


def test_maps_are_read_as_they_are_or_counted_from_one():
    numbers = np.zeros((6, 8), dtype=np.uint8)
    numbers[0], numbers[1], numbers[2] = 1, 2, 255
    plain = mapped([numbers])[0]
    assert plain["pixel_values"].shape == (3, 6, 8) and plain["pixel_values"].unique().tolist() == [-1.0]
    assert np.array_equal(plain["labels"].numpy(), numbers)
    numbers[3] = 3
    _, reduced = mapped([numbers], reduce_labels=True).sample(0)
    assert reduced[:, 0].tolist() == [0, 1, IGNORED, 2, IGNORED, IGNORED]
    palette_image = PILImage.fromarray(numbers % 3).convert("P")
    palette_image.putpalette([10, 200, 30] * 256)
    sixteen_bits = PILImage.fromarray((numbers % 3).astype(np.uint16))
    for image in (palette_image, sixteen_bits):
        assert np.array_equal(mapped([image]).sample(0)[1], numbers % 3)


def turned_file(pixels: np.ndarray, exif_orientation: int | None) -> dict:
    """A PNG file that says how it lies."""
    exif, file = PILImage.Exif(), io.BytesIO()
    if exif_orientation is not None:
        exif[0x0112] = exif_orientation
    PILImage.fromarray(pixels).save(file, "png", exif=exif)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize("turn", [3, 6])
def test_images_and_maps_are_turned_together_or_refused(turn):
    numbers = np.zeros((6, 8), dtype=np.uint8)
    numbers[0, 0] = 1  # the corner that the image marks too
    pixels = np.repeat(numbers[:, :, None] * 255, 3, axis=2)

    def images(image_lies, map_lies) -> MappedImages:
        features = Features({"image": Image(), "annotation": Image(), "image_id": Value("string")})
        files = {"image": turned_file(pixels, image_lies), "annotation": turned_file(numbers, map_lies)}
        row = {name: [file] for name, file in files.items()} | {"image_id": ["view"]}
        transform = WholeImage([0.5] * 3, [0.5] * 3)
        return MappedImages(Dataset.from_dict(row, features=features), "image", "annotation", transform, 3)

    for image_lies, map_lies in ((turn, turn), (1, None)):
        image, read = images(image_lies, map_lies).sample(0)
        assert np.array_equal(np.asarray(image)[:, :, 0] // 255, read) and read.sum() == 1
        assert read[0, 0] == (image_lies == 1)
    for image_lies, map_lies in ((turn, None), (turn, 1), (None, turn)):
        lies = f"of sample 0 of train (view) is {image_lies or 1} and that of its map {map_lies or 1}"
        with pytest.raises(ValueError, match=re.escape(lies)):
            images(image_lies, map_lies).check(0)


def test_bad_samples_are_named():
    good = np.ones((6, 8), dtype=np.uint8)
    cases = [
        (good[:5], "map of sample 1 of train (view_1) is 8x5 px and its image 8x6"),
        (good * 7, "map of sample 1 of train (view_1) has the class 7, but there are 3 classes, 0 to 2"),
        (good * 255, "map of sample 1 of train (view_1) has no labeled pixel"),
        (np.ones((6, 8, 3), dtype=np.uint8), "map of sample 1 of train (view_1) has 3 channels (RGB)"),
    ]
    for bad, sentence in cases:
        images = mapped([good, bad])
        images.check(0)
        for touch in (images.check, images.__getitem__):
            with pytest.raises(ValueError, match=re.escape(sentence)):
                touch(1)
    with pytest.raises(ValueError, match="has the class 4, but there are 3 classes, 1 to 3"):
        mapped([good * 4], reduce_labels=True).check(0)
    with pytest.raises(ValueError, match="map of sample 0 of train has no labeled pixel"):
        mapped([good * 0], reduce_labels=True, ids=False).check(0)
    broken = mapped([good])
    broken.maps = broken.maps.map(lambda row: {"annotation": {"bytes": b"nonsense", "path": None}})
    with pytest.raises(ValueError, match=r"map of sample 0 of train \(view_0\) cannot be read"):
        broken.check(0)


# -- crops ----------------------------------------------------------------------------------------------------------


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
        labeled = labels != IGNORED
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
    rare = np.full_like(numbers, IGNORED)
    rare[117, 391] = 1
    crop = TrainingCrop(32, [0.0] * 3, [1.0] * 3, (0.5, 4.0), 0.75, 0.5, photometric=False)
    for seed in range(30):
        with seeded(seed):
            assert (crop(image, rare)[1] == 1).any()
    mostly = np.zeros_like(numbers)
    mostly[:, 300:] = 1
    shares = {}
    for most in (0.75, 1.0):
        crop = TrainingCrop(100, [0.0] * 3, [1.0] * 3, (1.2, 1.2), most, 0.5, photometric=False)
        labels = []
        for seed in range(30):
            with seeded(seed):
                labels.append(crop(image, mostly)[1].float().mean())
        shares[most] = sum(0.25 <= share <= 0.75 for share in labels)
    assert shares[0.75] > 2 * shares[1.0]


def test_colors_change_and_maps_do_not():
    image, numbers = painted(64, 64)
    crops = []
    for photometric in (False, True):
        with seeded(1):
            crops.append(TrainingCrop(64, [0.0] * 3, [1.0] * 3, (1, 1), 1.0, 0.0, photometric)(image, numbers))
    assert torch.equal(crops[0][1], crops[1][1]) and not torch.equal(crops[0][0], crops[1][0])


# -- images of any size -------------------------------------------------------------------------------------------


class Pointwise(torch.nn.Module):
    """Logits that depend on each pixel alone; remembers the sizes it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values):
        self.seen.append(tuple(pixel_values.shape[2:]))
        logits = torch.cat([pixel_values[:, :1], -pixel_values[:, :1], pixel_values[:, 1:2] ** 2], dim=1)
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("height", "width"), [(37, 61), (16, 90), (48, 48)])
@pytest.mark.parametrize("stride", [None, 20, 32])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_and_mirrors_give_each_pixel_its_own_class(height, width, stride, flip):
    model, pixel_values = Pointwise(), torch.randn(3, height, width)
    probabilities = predict(model, pixel_values, min(height, width), 32, stride, (1.0,), flip, multiple=16)
    x = pixel_values
    assert_close(probabilities, torch.stack([x[0], -x[0], x[1] ** 2]).softmax(0), rtol=1e-5, atol=1e-6)
    assert all(rows % 16 == 0 and columns % 16 == 0 for rows, columns in model.seen)
    if stride:
        assert max(max(size) for size in model.seen) <= 32


def test_windows_that_overlap_are_averaged():
    class Counting(torch.nn.Module):
        def forward(self, pixel_values):  # each window says how often it was asked, in units of 1
            self.calls = getattr(self, "calls", 0) + 1
            logits = torch.full_like(pixel_values[:, :2], float(self.calls))
            logits[:, 1] = 0
            return type("Output", (), {"logits": logits})

    probabilities = predict(Counting(), torch.zeros(3, 16, 40), 16, 16, 12, multiple=16)
    # squares begin at 0, 12 and 24
    logits = torch.tensor([1.0] * 12 + [1.5] * 4 + [2.0] * 8 + [2.5] * 4 + [3.0] * 12)
    assert_close(probabilities[0], logits.sigmoid().expand(16, 40))


def test_scales_are_what_the_model_sees_and_are_averaged():
    model, pixel_values = Pointwise(), torch.randn(3, 40, 64)
    both = predict(model, pixel_values, 32, 32, None, (0.5, 2.0), multiple=8)
    assert model.seen == [(16, 32), (64, 104)]  # 16x25.6 and 64x102.4, padded
    single = [predict(model, pixel_values, 32, 32, None, (scale,), multiple=8) for scale in (0.5, 2.0)]
    assert_close(both, (single[0] + single[1]) / 2)
    assert both.shape == (3, 40, 64) and not torch.allclose(single[0], single[1], atol=1e-2)
    assert_close(both.sum(0), torch.ones(40, 64))


# -- schedule, layers, starts ---------------------------------------------------------------------------------------


def test_the_schedule_falls_from_the_first_step_and_warms_up():
    rates = [poly_learning_rate(step, 100, 10, 2.0, 1.0) for step in range(101)]
    assert rates[0] == 0 and rates[100] == 0 and rates[5] == 2.0 * 0.95 * 0.5 and rates[10] == 2.0 * 0.9
    assert rates[50] == 1.0 and poly_learning_rate(50, 100, 10, 2.0, 2.0) == 0.5
    with pytest.raises(ValueError, match="warmup_steps must be at least 0 and less than total_steps 100"):
        poly_learning_rate(0, 100, 100, 1.0, 1.0)


def test_the_dense_numbering_reaches_into_the_segmenter():
    start = new_segmenter(pyramid_start(None, "tiny"), NAMES, **SMALL)
    config = start.model.backbone.config
    groups = layerwise_parameter_groups(start.model, config, 0.05, 1e-3, 0.75, count_stem=False)
    layers = {name: group["layer_id"] for group in groups for name in group["names"]}
    prefix = "backbone.hivit"
    assert layers[f"{prefix}.stages.1.merge.reduction.weight"] == layers[f"{prefix}.position_embeddings"] == 0
    assert layers[f"{prefix}.stages.0.layers.1.mlp.fc1.weight"] == 0
    assert [layers[f"{prefix}.stages.2.layers.{i}.attention.qkv.weight"] for i in range(10)] == list(range(1, 11))
    heads = {layer for name, layer in layers.items() if not name.startswith(prefix)}
    assert heads == {11} and "backbone.norms.stage4.weight" in layers
    assert {group["lr"] for group in groups if group["layer_id"] == 11} == {1e-3}
    assert len(layers) == sum(1 for _ in start.model.parameters())
    assert "11  1.0000     1.000e-03" in layer_table(groups)


@pytest.mark.parametrize("kind", [HiViTForMaskedImageModeling, HiViTForImageClassification])
def test_a_segmenter_begins_with_the_weights_of_any_hivit(kind, tmp_path):
    folder = start_folder(tmp_path / "start", kind)
    start = load_segmenter(folder, NAMES, changes={"drop_path_rate": 0.1}, **SMALL)
    encoder = dict(kind.from_pretrained(folder).named_parameters())
    for name, parameter in start.model.backbone.hivit.named_parameters():
        assert torch.equal(parameter, encoder[f"hivit.{name}"]), name
    assert [start.model.config.id2label[i] for i in range(3)] == NAMES
    output = start.model(pixel_values=torch.randn(2, 3, 48, 64), labels=torch.randint(0, 3, (2, 48, 64)))
    assert output.logits.shape == (2, 3, 48, 64)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in start.model.parameters())
    resized = load_segmenter(folder, NAMES, crop_size=64, **SMALL).model
    assert resized.backbone.config.image_size == 64 and resized.backbone.hivit.position_embeddings.shape[1] == 64
    resized.save_pretrained(tmp_path / "segmenter")
    whole = load_segmenter(str(tmp_path / "segmenter"), NAMES, **SMALL).model
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(resized.named_parameters())[name]), name
    with pytest.raises(ValueError, match="has the 3 classes sky, earth, sea"):
        load_segmenter(str(tmp_path / "segmenter"), ["sky", "earth"])


def test_a_segmenter_is_gone_on_with_as_it_is_or_refused(tmp_path):
    encoder, folder = start_folder(tmp_path / "encoder", use_relative_position_bias=False), str(tmp_path / "segmenter")
    model = load_segmenter(encoder, NAMES, **SMALL).model
    model.save_pretrained(folder)
    changed = {"window_size": 2, "drop_path_rate": 0.2}
    whole = load_segmenter(folder, NAMES, changes=changed, **SMALL, auxiliary_weight=0.4)
    assert {name: getattr(whole.model.backbone.config, name) for name in changed} == changed and not whole.notes
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name]), name
    (note,) = load_segmenter(folder, NAMES, changes={"use_relative_position_bias": True}).notes
    assert "relative position tables" in note
    cases = [
        ({"architecture": "base"}, "The recipe is for base, whose hidden_size is 512, but that of .* is 32"),
        ({"changes": {"windowsize": 3}}, "has no keyword 'windowsize'"),
        ({"changes": {"depths": [1, 1, 7]}}, "do not fit the network: backbone.hivit.stages.2.layers.2"),
        ({"changes": {"depths": [1, 1, 1]}}, "do not fit the network: backbone.hivit.stages.2.layers.1"),
        ({"changes": {"hidden_size": 64}}, "do not fit the network"),
        ({"head_channels": 64}, "has head_channels 8, not 64: leave out --head_channels"),
        ({"auxiliary_channels": 64}, "has auxiliary_channels 8, not 64"),
        ({"auxiliary_weight": 0.0}, "has auxiliary_weight 0.4, not 0.0"),
    ]
    for keywords, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            load_segmenter(folder, NAMES, **keywords)
    with pytest.raises(ValueError, match=r"hivit\.stages\.2\.layers\.1.* left over"):
        load_segmenter(encoder, NAMES, changes={"depths": [1, 1, 1]}, **SMALL)
    start = load_segmenter(encoder, NAMES, head_channels=8, auxiliary_weight=0.0)
    start.model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has auxiliary_channels 0, not 64: leave out --auxiliary_channels"):
        load_segmenter(str(tmp_path / "plain"), NAMES, auxiliary_weight=0.0, auxiliary_channels=64)
    with pytest.raises(ValueError, match=r"has auxiliary_weight 0\.0, not 0\.4"):
        load_segmenter(str(tmp_path / "plain"), NAMES, auxiliary_weight=0.4)


# -- images for people --------------------------------------------------------------------------------------------


def test_overlays_show_classes_in_their_colors():
    colors = palette([*NAMES, *map(str, range(147))], opacity=0.5)
    assert len({tuple(color) for color in colors.tolist()}) == 150 and colors.shape == (150, 4)
    image = PILImage.new("RGB", (8, 6), (100, 100, 100))
    numbers = np.full((6, 8), IGNORED)
    numbers[:3] = 2
    laid = np.asarray(overlay(image, numbers, colors)).astype(int)
    assert (laid[3:] == 100).all() and np.abs(laid[0, 0] - (100 + colors[2, :3].astype(int)) / 2).max() <= 1
    sheet = overlay_sheet([(image, numbers, np.zeros_like(numbers))] * 2, NAMES, tile_px=64)
    assert sheet.width == 3 * 64 + 4 * 6 and tuple(colors[0, :3].tolist()) in {c for _, c in sheet.getcolors(100000)}


def test_background_is_faint_in_overlays():
    image, numbers = PILImage.new("RGB", (8, 6), (90, 200, 40)), np.zeros((6, 8), dtype=np.int64)
    for name, faint in (("sky", False), ("background", True), ("Other", True)):
        laid = np.asarray(overlay(image, numbers, palette([name, "sea"]))).astype(int)
        assert (np.abs(laid - np.asarray(image).astype(int)).max() < 50) == faint


# -- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory) -> str:
    """Sizes that are no multiples of the patch size."""
    folder = tmp_path_factory.mktemp("scenes") / "dataset"
    scenes_dataset({"train": 10, "test": 2}, height_px=60, width_px=75).save_to_disk(folder)
    return str(folder)


def run(dataset: str, output: Path, *flags: str) -> int:
    small = [
        "--auxiliary_weight",
        "0.4",
        "--learning_rate",
        "2e-3",
        "--layer_decay",
        "0.9",
        "--label_names",
        *map_names(),
    ]
    small += ["--head_channels", "8", "--auxiliary_channels", "8", "--crop_size", "32", "--eval_size", "60"]
    small += ["--batch_size", "2", "--effective_batch_size", "4", "--total_steps", "4", "--warmup_steps", "1"]
    small += ["--evaluate_every_steps", "2", "--log_every_steps", "1", "--shown_images", "2"]
    where = ["--dataset_name", dataset, "--output_dir", str(output), "--config", str(SCENES)]
    return finetune_segmentation.main([*small, *flags, *where])


def make_erratic(model: UperNetForSemanticSegmentation, image: PILImage.Image) -> UperNetForSemanticSegmentation:
    """Redraws what decides on classes; on the image no class is likelier than another, so small things decide."""
    classifier = model.decode_head.classifier
    pixel_values, _ = WholeImage(IMAGENET_MEAN, IMAGENET_STD)(image.crop((0, 0, 48, 40)), np.zeros((40, 48)))
    with seeded(0), torch.no_grad():
        torch.nn.init.normal_(classifier.weight)
        torch.nn.init.zeros_(classifier.bias)
        std, mean = torch.std_mean(model.eval()(pixel_values=pixel_values[None]).logits, (0, 2, 3))
        classifier.weight /= std[:, None, None, None]
        classifier.bias -= mean / std
    return model


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "eval_results.json").read_text())


@pytest.mark.slow
def test_a_run_by_the_command_line(small_scenes, tmp_path, capsys):
    start = ["--model_name_or_path", start_folder(tmp_path / "start")]
    looks = ["--eval_stride", "32", "--eval_scales", "1.0", "0.6", "--eval_flip", "true"]
    assert run(small_scenes, tmp_path / "whole", *start, *looks) == 0
    metrics = metrics_of(tmp_path / "whole")
    assert 0 <= metrics["eval_mean_iou"] <= 1 and "eval_iou_background" in metrics
    history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    rates = [record["learning_rate"] for record in history if "loss" in record]
    # of the first group, the stem: two layers below the last of the main stage, three below the heads
    assert_close(rates, [2e-3 * 0.9**3 * f for f in (0, 0.75, 0.5, 0.25)], rtol=1e-6, atol=0)
    assert sum("eval_mean_iou" in record for record in history) >= 2
    sheet = PILImage.open(tmp_path / "whole" / "overlays.png")
    assert sheet.width > 700 and sheet.height > 2 * 200

    # the same again, interrupted and resumed
    assert run(small_scenes, tmp_path / "part", *start, *looks, "--max_steps", "2") == 0
    assert run(small_scenes, tmp_path / "part", *start, *looks, "--resume", "latest") == 0
    assert metrics_of(tmp_path / "part")["eval_mean_iou"] == metrics["eval_mean_iou"]
    weights = [AutoModelForSemanticSegmentation.from_pretrained(tmp_path / name) for name in ("whole", "part")]
    for (name, one), (_, other) in zip(weights[0].named_parameters(), weights[1].named_parameters()):
        assert torch.equal(one, other), name

    # what was written is judged the same
    judged = ["--evaluate_only", "true", "--model_name_or_path"]
    assert run(small_scenes, tmp_path / "judged", *judged, str(tmp_path / "whole"), *looks) == 0
    assert metrics_of(tmp_path / "judged")["eval_mean_iou"] == metrics["eval_mean_iou"]
    # windows, scales and mirror images change what an erratic one sees
    make_erratic(weights[0], load_from_disk(small_scenes)["test"][0]["image"]).save_pretrained(tmp_path / "erratic")
    ways = [looks, [], *(looks[:2], looks[2:5], looks[5:])]
    for number, way in enumerate(ways):
        assert run(small_scenes, tmp_path / f"way_{number}", *judged, str(tmp_path / "erratic"), *way) == 0
    scores = [metrics_of(tmp_path / f"way_{number}")["eval_mean_iou"] for number in range(5)]
    assert len(set(scores)) == 5 and min(scores) > 0

    # what the pipeline says is in the size of the image
    segments = pipeline("image-segmentation", str(tmp_path / "whole"))(PILImage.new("RGB", (75, 60)))
    assert isinstance(weights[0], UperNetForSemanticSegmentation)
    assert all(segment["label"] in map_names() and segment["mask"].size == (75, 60) for segment in segments)
    assert sum(np.asarray(segment["mask"]).astype(bool) for segment in segments).min() == 1  # all pixels, once
    capsys.readouterr()
    assert run(small_scenes, tmp_path / "whole", *start) == 2
    assert "whole holds a run, at checkpoint-4: give --resume latest" in capsys.readouterr().err


@pytest.mark.slow
def test_every_other_flag_does_something(small_scenes, tmp_path, capsys):
    start = ["--model_name_or_path", start_folder(tmp_path / "start"), "--max_steps", "2"]
    assert run(small_scenes, tmp_path / "plain", *start) == 0
    plain = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "plain")
    flags = ["--ema_decay", "0.5", "--auxiliary_weight", "0", "--clip_norm", "0.1", "--shown_images", "0"]
    flags += ["--gradient_checkpointing", "true", "--drop_path_rate", "0.1", "--max_train_samples", "6"]
    flags += ["--max_eval_samples", "2", "--early_stopping_patience", "1", "--weight_decay", "0.2"]
    assert run(small_scenes, tmp_path / "other", *start, *flags) == 0
    other = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "other")
    assert plain.auxiliary_head is not None and other.auxiliary_head is None
    assert other.backbone.config.drop_path_rate == 0.1 and not (tmp_path / "other" / "overlays.png").exists()
    assert (tmp_path / "plain" / "overlays.png").exists()
    assert (tmp_path / "other" / "checkpoint-2" / "average.safetensors").exists()
    capsys.readouterr()
    assert run(small_scenes, tmp_path / "table", *start, "--show_layer_table", "true") == 0
    table = capsys.readouterr().out
    assert "backbone.norms.stage4.weight" in table and not (tmp_path / "table").exists()


def recipe_for(dataset: str, output: Path, **changes) -> SegmentationRecipe:
    values = read_recipe(SCENES, SegmentationRecipe) | {"from_scratch": True, "architecture": "tiny", **SMALL}
    values |= {"label_names": map_names(), "crop_size": 32, "eval_size": 60, "batch_size": 2, "effective_batch_size": 4}
    values |= {"model": json.dumps({"depths": [1, 1, 1], "hidden_size": 32, "num_attention_heads": 2, "patch_size": 8})}
    values |= {"dataset_name": dataset, "output_dir": str(output)} | changes
    recipe = SegmentationRecipe(**values)
    recipe.check()
    return recipe


def run_for(dataset: str, output: Path, **changes) -> SegmentationRun:
    return SegmentationRun(recipe_for(dataset, output, **changes), MEAN_IOU, say=lambda sentence: None)


def test_memory_does_not_grow_with_the_images_of_an_evaluation(small_scenes, tmp_path, monkeypatch):
    run = run_for(small_scenes, tmp_path / "run", shown_images=0)
    trainer, process, used = run._trainer(run._training_arguments()), psutil.Process(), []
    true = np.random.default_rng(0).integers(0, len(map_names()), (512, 683))

    def predictions(dataloader):
        for _ in range(30):
            used.append(process.memory_info().rss)
            yield torch.from_numpy((true + 1) % len(map_names())), {"labels": torch.from_numpy(true)}

    monkeypatch.setattr(trainer, "_predictions", predictions)
    rows = type("Rows", (), {"dataset": run.eval_images, "indices": range(30)})
    scores = trainer.evaluation_loop(type("Loader", (), {"dataset": rows}), "evaluating").metrics
    assert scores["eval_mean_iou"] == 0 and len(used) == 30
    assert used[-1] - used[2] < 50 * 2**20


def test_batch_norms_are_shared_on_several_gpus_only(small_scenes, tmp_path, monkeypatch):
    run = run_for(small_scenes, tmp_path / "run")
    before = list(run.model.state_dict())
    plain = sum(isinstance(module, torch.nn.BatchNorm2d) for module in run.model.modules())
    for number, device in ((1, "cuda"), (2, "cpu")):
        assert share_batch_norms(run.model, number, torch.device(device)) is run.model
    monkeypatch.setattr(run, "_make_trainer", lambda kind, args, **keywords: None)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda"))
    run._trainer(run._training_arguments())
    shared = sum(isinstance(module, torch.nn.SyncBatchNorm) for module in run.model.modules())
    assert shared == plain > 0 and list(run.model.state_dict()) == before


@pytest.mark.parametrize("how", ["FSDP", "ZeRO stage 3"])
def test_sharded_parameters_are_refused(small_scenes, tmp_path, monkeypatch, how):
    run, make = run_for(small_scenes, tmp_path / "run"), Trainer.create_accelerator_and_postprocess
    run._trainer(run._training_arguments())

    def make_sharded(trainer):
        make(trainer)
        trainer.is_fsdp_enabled = True  # which no process on CPUs can have

    if how == "FSDP":
        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", make_sharded)
    else:
        monkeypatch.setattr(dense, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="FSDP and ZeRO stage 3 want the same number of forward passes"):
        run._trainer(run._training_arguments())


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 5])
def test_two_processes_evaluate_every_image_once(tmp_path, images):
    data = tmp_path / "data"
    scenes_dataset({"test": images}, height_px=40, width_px=50).save_to_disk(data)
    start = load_segmenter(start_folder(tmp_path / "start"), map_names(), crop_size=32, **SMALL)
    image = load_from_disk(data)["test"][0]["image"]
    make_erratic(start.model, image).save_pretrained(tmp_path / "segmenter")
    values = {"--dataset_name": data, "--model_name_or_path": tmp_path / "segmenter", "--evaluate_only": "true"}
    values |= {"--config": SCENES, "--crop_size": 32, "--eval_size": 40}
    values |= {"--head_channels": 8, "--auxiliary_weight": 0.4}  # the recipe has others
    values |= {"--batch_size": 4, "--effective_batch_size": 8, "--output_dir": tmp_path / "one"}
    flags = ["--label_names", *map_names(), *(str(word) for item in values.items() for word in item)]
    assert finetune_segmentation.main(flags) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, EXAMPLES / "finetune_segmentation.py", *flags, "--output_dir", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "processes: 2" in done.stdout and (tmp_path / "two" / "overlays.png").exists()
    results = [metrics_of(tmp_path / name) for name in ("one", "two")]
    figures = [{name: one[name] for name in one if "iou" in name or "accuracy" in name} for one in results]
    assert figures[0] == figures[1] and figures[0]["eval_mean_iou"] > 0


def test_judging_needs_trained_heads_and_spoils_no_figures(small_scenes, tmp_path, capsys):
    backbone, judge = start_folder(tmp_path / "start"), ["--evaluate_only", "true", "--model_name_or_path"]
    cases = [(backbone, "is no segmenter"), (str(tmp_path / "nowhere"), "There is no folder")]
    for name, sentence in cases:
        assert run(small_scenes, tmp_path / "run", *judge, name) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()
    whole = tmp_path / "whole"
    load_segmenter(backbone, map_names(), crop_size=32, **SMALL).model.save_pretrained(whole)
    (whole / "eval_results.json").write_text("{}")
    assert run(small_scenes, whole, *judge, str(whole)) == 2
    assert "whole holds eval_results.json of another run: give another --output_dir" in capsys.readouterr().err
    assert (whole / "eval_results.json").read_text() == "{}" and not (whole / "overlays.png").exists()
    # of a dataset without images to learn from
    load_from_disk(small_scenes)["test"].to_parquet(tmp_path / "data" / "validation.parquet")
    assert run(str(tmp_path / "data"), tmp_path / "judged", *judge, str(whole)) == 0
    assert {"eval_results.json", "overlays.png"} <= {path.name for path in (tmp_path / "judged").iterdir()}
    asked = json.loads((tmp_path / "judged" / "recipe.json").read_text())
    assert asked["model_name_or_path"] == str(whole) and asked["eval_scales"] == [1.0] and asked["evaluate_only"]
    assert run(small_scenes, tmp_path / "judged", "--model_name_or_path", backbone) == 2
    assert "judged holds all_results.json of another run" in capsys.readouterr().err
    (tmp_path / "killed" / "checkpoint-2").mkdir(parents=True)
    assert run(small_scenes, tmp_path / "killed", *judge, str(whole)) == 2
    assert "killed holds checkpoint-2 of another run" in capsys.readouterr().err
    assert run(small_scenes, tmp_path / "held_out", *judge, str(whole), "--eval_fraction", "0.2") == 0
    assert "eval_mean_iou" in metrics_of(tmp_path / "held_out")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--crop_size", "30"], "crop_size must be a multiple of the patch size 8, got 30"),
        (["--map_column", "mask"], "train has no column 'mask'; its columns are image_id, image, annotation"),
        (["--label_names", "background", "digit"], "but there are 2 classes, 0 to 1"),
        (["--image_mean", "0.5"], "need 3 numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(flags, sentence, small_scenes, tmp_path, capsys):
    start = ["--model_name_or_path", start_folder(tmp_path / "start")]
    assert run(small_scenes, tmp_path / "run", *start, *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_a_bad_sample_stops_a_run_with_its_id(tmp_path, capsys):
    good = scenes_dataset({"train": 4, "test": 2}, height_px=40, width_px=48)
    rows = good["train"].to_list()
    rows[2]["annotation"] = np.zeros((40, 47), dtype=np.uint8)
    bad = DatasetDict(train=Dataset.from_list(rows, features=good["train"].features), test=good["test"])
    bad.save_to_disk(tmp_path / "data")
    start = ["--model_name_or_path", start_folder(tmp_path / "start")]
    assert run(str(tmp_path / "data"), tmp_path / "run", *start) == 2
    assert "sample 2 of train (train_00002) is 47x40 px and its image 48x40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch_size", "1", "--effective_batch_size", "1"], "cannot learn from one image"),
        (["--label_names", "sky"], "two classes or more"),
        (["--label_names", "sky", "sea", "sky"], "sky is there more than once"),
        (["--eval_stride", "40"], "leaves gaps between squares of 32 px"),
        (["--auxiliary_weight", "-1"], "auxiliary_weight must not be negative"),
        (["--head_channels", "0"], "head_channels must be a positive number"),
        (["--eval_scales", "0"], "eval_scales must be positive"),
        (["--scale_range", "2", "1"], "scale_range must be two numbers"),
        (["--layer_decay", "1.5"], "layer_decay must be in"),
        (["--warmup_steps", "9"], "warmup_steps must be less than total_steps 4"),
        (["--model", '{"drop_path_rate": 0.1}'], "has a flag of its own"),
        (["--model", '{"image_size": 32}'], "sets image_size, which follows from --crop_size"),
        (["--freeze_backbone", "true", "--drop_path_rate", "0.5"], "for a backbone that learns: set it to 0"),
        (["--label_names", *map(str, range(256))], "has 256 names, but as 255 is not labeled in the maps there can"),
        (["--reduce_labels", "true", "--label_names", *map(str, range(255))], "can be 254 with --reduce_labels"),
        (["--evaluate_only", "true", "--resume", "latest"], "no --resume"),
        (["--evaluate_only", "true", "--push_to_hub", "true"], "no model to upload"),
        (["--from_scratch", "true"], "Give either --model_name_or_path, or --from_scratch"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(flags, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run("nowhere", tmp_path, "--model_name_or_path", "anything", *flags)
    assert exit_info.value.code == 2 and sentence in capsys.readouterr().err


def crop_of(run: SegmentationRun) -> TrainingCrop:
    return run.train_images.transform


def trainer_of(run: SegmentationRun):
    return run._trainer(run._training_arguments())


def rates_of(run: SegmentationRun) -> list[float]:
    """Learning rates of the heads, relative to the highest, step by step."""
    trainer = trainer_of(run)
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    return [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(0, 400, 10)]


def stopper(run: SegmentationRun) -> EarlyStoppingCallback | None:
    callbacks = trainer_of(run).callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)), None)


FLAGS = {
    "freeze_backbone": (True, lambda run: not run.model.backbone.hivit.position_embeddings.requires_grad),
    "drop_path_rate": (0.3, lambda run: run.model.config.backbone_config.drop_path_rate == 0.3),
    "head_channels": (12, lambda run: run.model.decode_head.classifier.in_channels == 12),
    "auxiliary_weight": (0.3, lambda run: run.model.config.auxiliary_loss_weight == 0.3 and run.model.auxiliary_head),
    "auxiliary_channels": (12, lambda run: run.model.config.auxiliary_channels == 12),
    "model": ({"window_size": 2, "depths": [1, 1, 1], "patch_size": 8}, lambda run: run.config.window_size == 2),
    "image_mean": ([0.1, 0.2, 0.3], lambda run: crop_of(run).mean == list(run.processor.image_mean) == [0.1, 0.2, 0.3]),
    "image_std": ([0.1, 0.2, 0.3], lambda run: crop_of(run).std == list(run.processor.image_std) == [0.1, 0.2, 0.3]),
    "reduce_labels": (True, lambda run: run.train_images.reduce_labels and run.eval_images.reduce_labels),
    "crop_size": (48, lambda run: crop_of(run).crop_size == run.config.image_size == run.processor.size["width"] == 48),
    "scale_range": ([0.7, 0.8], lambda run: crop_of(run).scale_range == (0.7, 0.8)),
    "max_class_share": (0.6, lambda run: crop_of(run).max_class_share == 0.6),
    "flip_probability": (0.4, lambda run: crop_of(run).flip_probability == 0.4),
    "photometric": (True, lambda run: crop_of(run).distort is not None),
    "train_split": ("test", lambda run: len(run.train_images) == 2),
    "eval_split": ("train", lambda run: len(run.eval_images) == 10),
    "eval_fraction": (0.3, lambda run: len(run.train_images) == 7 and len(run.eval_images) == 3),
    "label_names": (list("abcdefghijklm"), lambda run: run.model.config.num_labels == 13),
    "max_train_samples": (5, lambda run: len(run.train_images) == 5),
    "max_eval_samples": (1, lambda run: len(run.eval_images) == 1),
    "seed": (5, lambda run: run.train_images.seed == trainer_of(run).args.data_seed == 5),
    "total_steps": (200, lambda run: run._training_arguments().max_steps == 200 and rates_of(run)[20:] == [0.0] * 20),
    "warmup_steps": (100, lambda run: rates_of(run)[5] == 0.5 * (1 - 50 / 320)),
    "poly_power": (2.0, lambda run: rates_of(run)[16] == 0.25),
    "max_steps": (3, lambda run: run._training_arguments().max_steps == 3),
    "batch_size": (4, lambda run: run._training_arguments().per_device_train_batch_size == 4),
    "learning_rate": (0.5, lambda run: "5.000e-01" in run.layer_table()),
    "layer_decay": (0.1, lambda run: "0.1000" in run.layer_table()),
    "weight_decay": (0.3, lambda run: "0.3" in run.layer_table()),
    "adam_betas": ([0.5, 0.6], lambda run: trainer_of(run).create_optimizer().defaults["betas"] == (0.5, 0.6)),
    "clip_norm": (0.5, lambda run: run._training_arguments().max_grad_norm == 0.5),
    "mixed_precision": ("bf16", lambda run: run._training_arguments().bf16),
    "compile": (True, lambda run: run._training_arguments().torch_compile),
    "num_workers": (1, lambda run: trainer_of(run).get_eval_dataloader().num_workers == 1),
    "evaluate_every_steps": (3, lambda run: run._training_arguments().eval_steps == 3),
    "keep_last": (5, lambda run: run._training_arguments().save_total_limit == 5),
    "log_every_steps": (7, lambda run: run._training_arguments().logging_steps == 7),
    "tracker": ("tensorboard", lambda run: run._training_arguments().report_to == ["tensorboard"]),
    "early_stopping_patience": (3, lambda run: stopper(run) and stopper(run).early_stopping_patience == 3),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_reach_what_they_are_about(small_scenes, tmp_path, name):
    value, holds = FLAGS[name]
    assert not holds(run_for(small_scenes, tmp_path / "run"))
    assert holds(run_for(small_scenes, tmp_path / "run", **{name: value}))


def test_columns_and_checks_are_those_that_were_asked_for(small_scenes, tmp_path):
    renamed = load_from_disk(small_scenes).rename_columns({"image": "photo", "annotation": "classes"})
    renamed.save_to_disk(tmp_path / "data")
    columns = {"image_column": "photo", "map_column": "classes"}
    seen = {}
    for limit in (0, 1, 1000):
        run, seen[limit] = run_for(str(tmp_path / "data"), tmp_path / str(limit), **columns, check_images=limit), []
        run.eval_images.check = seen[limit].append
        run.evaluate()
    assert seen == {0: [], 1: [0], 1000: [0, 1]}


def test_every_flag_is_tested():
    elsewhere = {"title", "source", "cost", "expected_result"}
    # whole runs, and what they begin with
    elsewhere |= {
        "architecture",
        "model_name_or_path",
        "from_scratch",
        "dataset_name",
        "output_dir",
        "resume",
        "evaluate_only",
    }
    elsewhere |= {"eval_size", "eval_stride", "eval_scales", "eval_flip", "shown_images", "show_layer_table"}
    elsewhere |= {"ema_decay", "gradient_checkpointing", "effective_batch_size", "image_column", "map_column"}
    elsewhere |= {"check_images"}
    # what all trainings share: tests/test_labeled.py, tests/test_finetune.py
    elsewhere |= {"dataset_config", "dataset_revision", "push_to_hub", "hub_model_id", "hub_private_repo"}
    assert {item.name for item in fields(SegmentationRecipe)} == elsewhere | set(FLAGS)
    assert not elsewhere & set(FLAGS)


def test_recipes_hold_the_published_numbers(tmp_path):
    recipe = SegmentationRecipe(
        **read_recipe(EXAMPLES / "recipes" / "segmentation_base_ade20k.yaml", SegmentationRecipe)
    )
    assert len(set(recipe.label_names)) == 150 and recipe.label_names[12] == "person" and recipe.reduce_labels
    assert (recipe.learning_rate, recipe.layer_decay, recipe.total_steps, recipe.warmup_steps) == (
        1e-3,
        0.75,
        80000,
        750,
    )
    assert (recipe.crop_size, recipe.effective_batch_size, recipe.drop_path_rate) == (640, 32, 0.1)
    assert recipe.head_channels == 1024 and recipe.poly_power == 1.0 and recipe.weight_decay == 0.05
    replace(recipe, dataset_name="ade", model_name_or_path="base", output_dir=str(tmp_path)).check()
