# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Nearest neighbors of frozen features."""

import torch


def nearest_neighbor_accuracy(features: torch.Tensor, labels: torch.Tensor, neighbors: int = 20) -> float:
    """
    `nearest_neighbors` of the second half of the images in the first half.

    Args:
        features: (B, C), one row per image.
        labels: (B,), class numbers.
        neighbors: how many are asked.
    """
    half = len(features) // 2
    predicted = nearest_neighbors(features[:half], labels[:half], features[half:], neighbors)
    return (predicted == labels[half:].cpu()).float().mean().item()


@torch.no_grad()
def nearest_neighbors(
    known: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, neighbors: int = 20, temperature: float = 0.07
) -> torch.LongTensor:
    """
    The label of most of each image's nearest neighbors, weighted by exp(cosine similarity / temperature), as in
    DINO (arXiv 2104.14294): (number asked,), on the CPU.

    Args:
        known: features of images with labels, (number known, C).
        labels: their class numbers, (number known,).
        asked: features of the others, (number asked, C).
        neighbors: how many are asked.
        temperature: how fast weights fall with distance.
    """
    known, asked = (torch.nn.functional.normalize(features.float(), dim=1) for features in (known, asked))
    predicted = []
    for part in asked.split(1024):
        similarity, index = (part @ known.t()).topk(min(neighbors, len(known)), dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1, device=known.device)
        votes.scatter_add_(1, labels.to(known.device)[index], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted)
