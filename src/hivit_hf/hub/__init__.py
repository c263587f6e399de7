# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""On the Hub: repositories, model cards, ONNX, inference endpoints."""
