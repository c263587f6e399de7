# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Linear probes of frozen features: logistic regression (L-BFGS), and the LARS probe of MAE."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from timm.optim import Lars
from torch import nn
from tqdm.auto import tqdm

from ..training.optim import cosine_learning_rate


def standardize(train: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, standardized by the mean and standard deviation of each channel of `train`."""
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    return (train - mean) / std, (other - mean) / std


def probe_lbfgs(
    train: torch.Tensor, labels: torch.Tensor, other: torch.Tensor, strength: float = 1.0, steps: int = 1000
) -> np.ndarray:
    """
    Scores (others, classes) of a logistic regression fitted by L-BFGS (scikit-learn's); minus infinity for classes that
    do not occur in `labels`.

    Args:
        train: training features (images, C).
        labels: their class numbers (images,).
        other: features to score (others, C).
        strength: of the L2 regularization; the inverse of scikit-learn's C.
        steps: maximum number of iterations.
    """
    train, other = standardize(train, other)
    fitted = LogisticRegression(C=1 / strength, max_iter=steps).fit(train.numpy(), labels.numpy())
    scores = np.full((len(other), int(labels.max()) + 1), -np.inf)
    scores[:, fitted.classes_] = fitted.predict_log_proba(other.numpy())
    return scores


def probe_lars(
    train: torch.Tensor,
    labels: torch.Tensor,
    other: torch.Tensor,
    learning_rate: float = 6.4,
    epochs: int = 90,
    warmup_epochs: int = 10,
    batch_size: int = 16384,
    seed: int = 0,
) -> np.ndarray:
    """
    Scores (others, classes) of the linear probe of MAE (arXiv 2111.06377, appendix A.1): batch norm without weights and
    a linear layer, trained by LARS with momentum 0.9, no weight decay, warmup and cosine schedule.

    Args:
        train, labels, other: as in `probe_lbfgs`.
        learning_rate: peak learning rate; MAE's is 0.1 per 256 of its 16384 images per step. It is not scaled down for
            smaller batches, as LARS scales it by the weights and there are fewer steps.
        epochs, warmup_epochs: over the features.
        batch_size: features per step; all of them, if there are fewer.
        seed: of the order and the initialization.
    """
    generator = torch.Generator().manual_seed(seed)
    batch_size = min(batch_size, len(train))
    norm = nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6)
    linear = nn.Linear(train.shape[1], int(labels.max()) + 1)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(norm, linear).train()
    # layer-wise learning rates for the matrix only; timm leaves them out without weight decay, unless it is told
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias]}]
    optimizer = Lars(groups, lr=learning_rate, momentum=0.9)
    per_epoch = len(train) // batch_size
    for step in tqdm(range(epochs * per_epoch), desc="linear probe (LARS)", unit="step", delay=2):
        if step % per_epoch == 0:
            order = torch.randperm(len(train), generator=generator)
        rows = order[step % per_epoch * batch_size :][:batch_size]
        for group in optimizer.param_groups:
            group["lr"] = cosine_learning_rate(step, epochs * per_epoch, warmup_epochs * per_epoch, learning_rate)
        loss = nn.functional.cross_entropy(head(train[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return head.eval()(other).numpy()
