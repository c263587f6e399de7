"""k-nearest-neighbor classification of features."""

import torch

from hivit_hf.training.neighbors import nearest_neighbor_accuracy


def test_nearest_neighbors_find_what_is_alike():
    labels = torch.arange(60) % 3
    known, unknown = labels[:30], labels[30:]
    features = torch.nn.functional.one_hot(labels, 8).float() + 0.1 * torch.randn(60, 8)
    assert nearest_neighbor_accuracy(features[:30], known, features[30:], unknown) > 0.95
    noise = torch.randn(60, 8)
    assert nearest_neighbor_accuracy(noise[:30], known, noise[30:], unknown) < 0.7


def test_class_numbers_may_be_large():
    labels = torch.arange(60) % 3 * 4 * 10**14
    features = torch.nn.functional.one_hot(labels.div(4 * 10**14, rounding_mode="floor"), 8).float()
    assert nearest_neighbor_accuracy(features[:30], labels[:30], features[30:], labels[30:]) == 1
