# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Seeding: seeds derived from what they are for, and a context that seeds Python, numpy and torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import xxhash


def seed_of(*parts: int | str) -> int:
    """A number in [0, 2**63) that depends on the parts alone, in every process and every run."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode()) >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python, numpy and torch (on the CPU) inside, and restores their random states afterwards."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])
