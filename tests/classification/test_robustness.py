"""Robustness: corruptions, patch drop and shuffle, pixels as the processor makes them."""

import pytest
import torch
from datasets import DatasetDict
from torch.testing import assert_close
from transformers import BitImageProcessor

from digits.data import digits_processor
from hivit_hf import HiViTConfig, HiViTForImageClassification
from hivit_hf.classification.evaluation import load_for_evaluation, targets_for
from hivit_hf.classification.robustness import CORRUPTIONS, robustness, shuffle_grids, shuffle_patches
from support.digit_folders import SMALL, evaluate_with_script


def test_corruptions():
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    for kind, (corrupt, strengths) in CORRUPTIONS.items():
        distances = []
        for strength in (strengths[0], strengths[-1]):
            damaged = corrupt(pixels, strength)
            assert damaged.shape == pixels.shape and damaged.dtype == torch.uint8, kind
            distances.append((damaged.float() - pixels.float()).abs().mean().item())
        assert distances[0] > 0, kind
        assert distances[1] > distances[0], kind
    shuffled = shuffle_patches(pixels, 4)
    assert not torch.equal(shuffled, pixels)
    assert torch.equal(shuffled.flatten(1).sort(dim=1).values, pixels.flatten(1).sort(dim=1).values)
    corner = {
        tuple(piece.flatten().tolist()) for piece in pixels[0, 0].unfold(0, 28, 28).unfold(1, 28, 28).flatten(0, 1)
    }
    assert tuple(shuffled[0, 0, :28, :28].flatten().tolist()) in corner
    assert shuffle_grids(14) == [2, 7, 14] and shuffle_grids(4) == [2, 4]


def test_robustness_of_a_classifier(classifiers, data, tmp_path):
    flags = ["--max_eval_samples", "40", "--robustness", "--severities", "1", "5"]
    results = evaluate_with_script(classifiers[:1], data, tmp_path, *flags)
    settings = results["settings"]
    assert settings["model_name_or_path"] == classifiers[:1] and settings["eval_split_name"] == "test"
    table = results["robustness"]
    assert set(table) == {"none", "patch drop", "patch shuffle", *CORRUPTIONS}
    assert table["none"]["0"] == pytest.approx(results["accuracy"])
    assert set(table["jpeg"]) == {"1", "5"} and set(table["patch drop"]) == {"0.1", "0.9"}
    assert set(table["patch shuffle"]) == {"2", "4"}
    assert (tmp_path / "robustness.png").exists()
    model, processor = load_for_evaluation(classifiers[0])
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(20))
    seen = []
    model.hivit.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    again = robustness(model, processor, images, "image", targets_for(model, images, "test"), [5])
    masks = [mask for mask in seen if mask is not None]
    assert len(masks) == 1 and masks[0].sum(dim=1).tolist() == [14] * 20
    assert again["patch drop"].keys() == {"0.9"}


@pytest.mark.parametrize(
    "step",
    [
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.2, "image_std": 0.3},
    ],
    ids=["no normalization", "no rescaling", "another scale", "numbers"],
)
def test_robustness_sees_pixels_as_the_processor_makes_them(step, data):
    settings = digits_processor().to_dict() | step
    processor = BitImageProcessor(**{key: settings[key] for key in settings if key != "image_processor_type"})
    images = DatasetDict.load_from_disk(data / "few")["test"].select(range(4))
    seen = []
    model = HiViTForImageClassification(HiViTConfig(**SMALL, image_size=32, num_labels=10)).eval()
    model.hivit.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    robustness(model, processor, images, "image", torch.zeros(4, dtype=torch.long), [1])
    expected = processor([image.convert("RGB") for image in images["image"]], return_tensors="pt")
    assert_close(seen[0], expected["pixel_values"], atol=2e-4, rtol=1e-5)
