"""Whatever a user can get wrong is a ValueError that says what, what was given, and what would do; within a second."""

import time

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForImageClassification

from hivit_hf import HiViTBackbone, HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel


@pytest.fixture(autouse=True)
def within_a_second():
    start = time.process_time()  # of work: the machine may be busy with other things
    yield
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"hiden_size": 64}, r"no keyword 'hiden_size' \(got hiden_size=64\). Did you mean 'hidden_size'\?"),
        ({"num_hidden_layers": 12}, r"'num_hidden_layers' .* follows from 'depths'"),
        ({"qwertyuiop": 1}, r"no keyword 'qwertyuiop' .* The keywords are .*image_size"),
        ({"depths": [2, 20]}, r"depths must be three positive numbers like \[2, 2, 20\], got \[2, 20\]"),
        ({"depths": [2, 0, 20]}, r"depths .* got \[2, 0, 20\]"),
        ({"depths": []}, r"depths .* got \[\]"),
        ({"hidden_size": 510}, r"hidden_size must be a multiple of 4, got 510"),
        ({"num_attention_heads": 7}, r"num_attention_heads must divide hidden_size 512, got 7; the nearest .* 8"),
        ({"decoder_num_attention_heads": 10}, r"decoder_num_attention_heads must divide .* 512, got 10; .* 8"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be positive, got 0"),
        ({"hidden_size": -4}, r"hidden_size must be positive, got -4"),
        ({"patch_size": 10}, r"patch_size must be a multiple of 4.*got 10; use 8 or 12"),
        (
            {"image_size": 230},
            r"image_size .* multiple of patch_size 16.*got 230; the nearest are \['224 or 240', '224 or 240'\]",
        ),
        ({"image_size": [224, 100]}, r"got \[224, 100\]; the nearest are \['224', '96 or 112'\]"),
        ({"image_size": [224] * 3}, r"or two \(height, width\), got \[224, 224, 224\]"),
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.1}, r"mask_ratio must be in \[0, 1\), got -0.1"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must be in \[0, 1\), got 1.5"),
        ({"out_features": ["stage3", "stage4"]}, r"out_features got \['stage4'\], which do not exist; choose from"),
        ({"out_features": ["stage4"]}, r"or set add_pooled_stage=True for 'stage4'"),
        ({"add_pooled_stage": True, "out_features": ["stage3"]}, r"adds 'stage4', but .*\['stage3'\] leave it out"),
        (
            {"add_pooled_stage": True, "out_indices": [1, 3]},
            r"adds 'stage4', but .* leave it out: name it there",
        ),
        ({"out_features": ["stage3", "stage1"]}, r"same order"),
        ({"out_indices": [7]}, r"out_indices"),
        ({"out_features": []}, r"out_features is empty: choose from \['stem', "),
        ({"hidden_act": "gellu"}, r"hidden_act 'gellu'.*gelu"),
        ({"mlp_ratio": 0.001}, r"mlp_ratio 0.001 of 512 channels leaves an MLP without width: give 0.00195 or more"),
        ({"early_mlp_ratio": 0.005}, r"early_mlp_ratio 0.005 of 128 channels leaves an MLP without width"),
        ({"initializer_range": 0}, r"initializer_range must be positive, got 0"),
        ({"_note": "mine"}, r"no keyword '_note'"),
        ({"window_size": 0}, r"window_size must be positive, got 0. The published value is 14"),
        ({"global_attention_layers": [4]}, r"global_attention_layers \[4\] needs window_size: give it, or leave"),
        ({"attend_to_window_padding": True}, r"attend_to_window_padding True needs window_size"),
        (
            {"window_size": 14, "global_attention_layers": [4, 20, -1]},
            r"global_attention_layers \[20, -1\] do not exist: the main stage has layers 0 to 19",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration(keywords, message):
    with pytest.raises(ValueError, match=message):
        HiViTConfig(**keywords)


@pytest.mark.parametrize("load", [HiViTConfig, AutoConfig, HiViTModel, AutoModelForImageClassification], ids=str)
def test_keywords_beside_a_file(load, tiny_config, tmp_path):
    HiViTForImageClassification(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no keyword 'drop_path'. Did you mean 'drop_path_rate'\?"):
        load.from_pretrained(tmp_path, drop_path=0.1)
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 3.0"):
        load.from_pretrained(tmp_path, mask_ratio=3.0)
    loading = {"cache_dir": None, "token": None, "revision": "main", "local_files_only": True, "subfolder": ""}
    loaded = load.from_pretrained(tmp_path, drop_path_rate=0.1, **loading)
    assert getattr(loaded, "config", loaded).drop_path_rate == 0.1


def test_problem_type():
    # transformers 5.17 refuses it itself, with an error of its own
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=r"(?s)problem_type.*multi_label"):
        HiViTConfig(problem_type="multi_label")


def test_unknown_architecture():
    with pytest.raises(ValueError, match=r"no HiViT architecture named 'huge'. Choose from tiny, small"):
        HiViTConfig.from_architecture("huge")


def test_later_assignments_are_caught_by_the_model(tiny_config):
    config = tiny_config()
    config.num_attention_heads = 5
    with pytest.raises(
        ValueError, match=r"num_attention_heads must divide hidden_size 32, got 5; the nearest that does is 4"
    ):
        HiViTModel(config)


def test_a_mask_ratio_that_leaves_no_unit_visible(tiny_config):
    with pytest.raises(ValueError, match=r"mask_ratio 0.95 of 16 units leaves none. Lower mask_ratio to 0.936 or less"):
        HiViTForMaskedImageModeling(tiny_config(mask_ratio=0.95))
    HiViTForImageClassification(tiny_config(mask_ratio=0.95))
    model = HiViTForMaskedImageModeling(tiny_config())
    with pytest.raises(ValueError, match=r"mask_ratio 0.75 of 1 units leaves none"):
        model(torch.zeros(1, 3, 16, 16))
    model.config.mask_ratio = 1.2
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 1.2"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 0, 64), r"got 0x64"),
        ((1, 1, 64, 64), r"\(batch, 3 channels, height, width\), got \(1, 1, 64, 64\)"),
        ((1, 4, 64, 64), r"\(batch, 3 channels, height, width\), got \(1, 4, 64, 64\)"),
        ((3, 64, 64), r"\(batch, 3 channels, height, width\), got \(3, 64, 64\)"),
        ((0, 3, 64, 64), r"got \(0, 3, 64, 64\)"),
        (None, r"got a NoneType"),
    ],
)
@pytest.mark.parametrize(
    "model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification, HiViTBackbone]
)
def test_images(model_class, shape, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(None if shape is None else torch.zeros(shape))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((70, 64), r"multiples of patch_size 16, got 70x64. Resize to height 64 or 80 and width 64\."),
        ((64, 8), r"got 64x8. Resize to height 64 and width 16\."),
    ],
)
@pytest.mark.parametrize("model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification])
def test_images_that_do_not_end_with_a_unit(model_class, size, message, tiny_config):
    """Backbones alone take them."""
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(torch.zeros(1, 3, *size))


def unequal_rows():
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :4] = mask[1, :5] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 15), r"\(batch, units\) = \(2, 16\), one value per unit, got \(2, 15\)"),
        (torch.zeros(1, 16), r"= \(2, 16\).*got \(1, 16\)"),
        (torch.zeros(2, 4, 4), r"= \(2, 16\).*got \(2, 4, 4\)"),
        (unequal_rows(), r"same number of units, got rows with \[11, 12\] visible"),
        (torch.ones(2, 16), r"masks all 16 units: leave at least one visible"),
    ],
    ids=["units", "batch", "grid", "unequal", "everything"],
)
@pytest.mark.parametrize("model_class", [HiViTModel, HiViTForMaskedImageModeling, HiViTForImageClassification])
def test_masks(model_class, mask, message, tiny_config):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(torch.zeros(2, 3, 64, 64), bool_masked_pos=mask)


def test_masks_where_there_is_nothing_to_mask(tiny_config, draw_masks):
    pixel_values, mask = torch.zeros(2, 3, 64, 64), draw_masks(2, 16, 4)
    with pytest.raises(ValueError, match=r"HiViTBackbone got bool_masked_pos, but a map needs all units"):
        HiViTBackbone(tiny_config())(pixel_values, bool_masked_pos=mask)
    with pytest.raises(ValueError, match=r"num_visible_units \(12\) needs bool_masked_pos"):
        HiViTModel(tiny_config())(pixel_values, num_visible_units=12)


def test_noise(tiny_config):
    with pytest.raises(
        ValueError, match=r"noise must be a tensor \(batch, units\) = \(2, 16\), one value per unit, got \(2, 49\)"
    ):
        HiViTForMaskedImageModeling(tiny_config())(torch.zeros(2, 3, 64, 64), noise=torch.rand(2, 49))


@pytest.mark.parametrize("given", [[[0] * 16] * 2, torch.zeros(2, 16).numpy()], ids=["list", "numpy"])
def test_masks_and_noise_that_are_no_tensors(given, tiny_config):
    model, pixel_values = HiViTForMaskedImageModeling(tiny_config()), torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"bool_masked_pos must be a tensor .* got a (list|ndarray)"):
        model(pixel_values, bool_masked_pos=given)
    with pytest.raises(ValueError, match=r"noise must be a tensor .* got a (list|ndarray)"):
        model(pixel_values, noise=given)
    with pytest.raises(ValueError, match=r"pixel_values must be a tensor .* got a ndarray"):
        model(pixel_values.numpy())


def test_a_pair_of_sizes_may_be_assigned_later(tiny_config):
    config = tiny_config()
    config.image_size = (32, 64)
    assert HiViTModel(config).position_embeddings.shape[1] == 8
    config.image_size = (32, 65)
    with pytest.raises(ValueError, match=r"got \(32, 65\); the nearest are \['32', '64 or 80'\]"):
        HiViTModel(config)


def test_windows_and_masks_exclude_each_other():
    config = HiViTConfig(image_size=64, hidden_size=32, depths=[1, 1, 1], num_attention_heads=2, window_size=2)
    with pytest.raises(ValueError, match=r"Windows of 2 units need all of them: give no mask, or set window_size to"):
        HiViTForMaskedImageModeling(config)(torch.randn(1, 3, 64, 64))
