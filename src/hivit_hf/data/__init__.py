# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images and labels: decoding, transforms, exact streams, datasets, seeding."""
