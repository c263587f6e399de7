# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Object detection and instance segmentation with R-CNNs and Deformable DETR."""
