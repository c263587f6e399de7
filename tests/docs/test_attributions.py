"""The page on CAM, attributions and attention rollout: its code runs, and finds what decides."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from hivit_hf import HiViTForImageClassification
from hivit_hf.image_processing import evaluation_processor


PAGE = Path(__file__).parents[2] / "docs/attributions.md"


@pytest.fixture
def ran(tiny_config, tmp_path, monkeypatch):
    """The names that the code of the page leaves behind, run in order on a small network."""
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("captum")
    torch.manual_seed(0)
    HiViTForImageClassification(tiny_config(initializer_range=0.1)).save_pretrained(tmp_path / "demo_output/model")
    evaluation_processor(64, crop_pct=1.0).save_pretrained(tmp_path / "demo_output/model")
    image = Image.new("L", (64, 64))
    image.paste(255, (16, 32, 48, 48))  # two units in the third row
    (tmp_path / "demo_output/samples").mkdir()
    image.save(tmp_path / "demo_output/samples/digit_0.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, PAGE, "exec"), names)
    return names


def test_every_block_runs_and_gives_maps_of_the_image(ran):
    for name in ("heat", "fine_heat"):
        assert ran[name].shape == (1, 64, 64) and 0 <= ran[name].min() < ran[name].max() <= 1, name
    for name in ("gradients", "occlusion"):
        assert ran[name].shape == (1, 3, 64, 64) and ran[name].isfinite().all(), name
    assert ran["rollout_heat"].shape == (1, 1, 4, 4)
    torch.testing.assert_close(ran["rollout_heat"].sum(), torch.tensor(1.0))


def test_occlusion_is_one_number_per_unit_and_that_of_the_logits(ran):
    model, pixel_values, label = ran["model"], ran["pixel_values"], ran["label"]
    occluded = pixel_values.clone()
    occluded[:, :, 32:48, 16:32] = 0
    with torch.no_grad():
        expected = (model(pixel_values).logits - model(occluded).logits)[0, label]
    found = ran["occlusion"][0, 0, 32:48, 16:32]
    torch.testing.assert_close(found, expected.expand(16, 16), check_dtype=False)
