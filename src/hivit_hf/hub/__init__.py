# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Repositories of the Hub, model cards, ONNX, inference endpoints."""
