# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training of HiViT: what the examples build on. Nothing here is imported by the network itself."""
