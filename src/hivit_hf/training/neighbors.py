# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""k-nearest-neighbor (kNN) classification of frozen features."""

import torch


def nearest_neighbor_accuracy(
    train: torch.Tensor, labels: torch.Tensor, other: torch.Tensor, targets: torch.Tensor, neighbors: int = 20
) -> float:
    """Top-1 accuracy of `nearest_neighbors` with the class numbers `targets` (others,)."""
    return (nearest_neighbors(train, labels, other, neighbors) == targets.cpu()).float().mean().item()


@torch.no_grad()
def nearest_neighbors(
    train: torch.Tensor, labels: torch.Tensor, other: torch.Tensor, neighbors: int = 20, temperature: float = 0.07
) -> torch.LongTensor:
    """
    Class numbers (others,), on the CPU, by a vote of the nearest neighbors, weighted by
    exp(cosine similarity / temperature), as in DINO (arXiv 2104.14294).

    Args:
        train: training features (images, C).
        labels: their class numbers (images,).
        other: features to classify (others, C).
        neighbors: k, number of neighbors.
        temperature: of the weights; the lower, the less do distant neighbors weigh.
    """
    train, other = (torch.nn.functional.normalize(features.float(), dim=1) for features in (train, other))
    classes, labels = labels.unique(return_inverse=True)  # those that occur: class numbers may be large
    predicted = []
    for part in other.split(1024):
        similarity, index = (part @ train.t()).topk(min(neighbors, len(train)), dim=1)
        votes = torch.zeros(len(part), len(classes), device=train.device)
        votes.scatter_add_(1, labels.to(train.device)[index], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1).cpu())
    return classes.cpu()[torch.cat(predicted)]
