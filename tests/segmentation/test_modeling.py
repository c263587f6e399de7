"""Prediction on images of any size: sliding windows, mirror images, scales."""

import pytest
import torch
from torch.testing import assert_close

from hivit_hf.segmentation.modeling import predict


class Pointwise(torch.nn.Module):
    """Logits that depend on each pixel alone; remembers the sizes of its inputs."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, pixel_values):
        self.sizes.append(tuple(pixel_values.shape[2:]))
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
    assert all(rows % 16 == 0 and columns % 16 == 0 for rows, columns in model.sizes)
    if stride:
        assert max(max(size) for size in model.sizes) <= 32


def test_windows_that_overlap_are_averaged():
    class Counting(torch.nn.Module):
        def forward(self, pixel_values):  # the number of calls so far
            self.calls = getattr(self, "calls", 0) + 1
            logits = torch.full_like(pixel_values[:, :2], float(self.calls))
            logits[:, 1] = 0
            return type("Output", (), {"logits": logits})

    probabilities = predict(Counting(), torch.zeros(3, 16, 40), 16, 16, 12, multiple=16)
    # squares begin at 0, 12 and 24
    logits = torch.tensor([1.0] * 12 + [1.5] * 4 + [2.0] * 8 + [2.5] * 4 + [3.0] * 12)
    assert_close(probabilities[0], logits.sigmoid().expand(16, 40))


def test_scales_are_inputs_of_the_model_and_are_averaged():
    model, pixel_values = Pointwise(), torch.randn(3, 40, 64)
    both = predict(model, pixel_values, 32, 32, None, (0.5, 2.0), multiple=8)
    assert model.sizes == [(16, 32), (64, 104)]  # 16x25.6 and 64x102.4, padded
    single = [predict(model, pixel_values, 32, 32, None, (scale,), multiple=8) for scale in (0.5, 2.0)]
    assert_close(both, (single[0] + single[1]) / 2)
    assert both.shape == (3, 40, 64) and not torch.allclose(single[0], single[1], atol=1e-2)
    assert_close(both.sum(0), torch.ones(40, 64))
