"""The benchmarks compare equal things: the model in the original's order of operations gives the numbers of ours."""

import copy

import pytest
import torch
from torch.testing import assert_close

from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling
from original_order import reorder


@pytest.mark.parametrize("bias", [True, False])
def test_original_order_equals_ours(bias, tiny_config, redraw):
    config = tiny_config(use_relative_position_bias=bias)
    pixel_values, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    ours = redraw(HiViTForMaskedImageModeling(config))
    original = reorder(copy.deepcopy(ours))
    expected, output = ours(pixel_values, noise=noise), original(pixel_values, noise=noise)
    assert type(original.hivit.stages[0].merge) is not type(ours.hivit.stages[0].merge)
    assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    classifier = redraw(HiViTForImageClassification(tiny_config(use_relative_position_bias=bias)))
    expected = classifier(pixel_values).logits
    assert_close(reorder(classifier)(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)
