# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Masked pre-training with Accelerate on streams, exact to the sample."""
