# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the trainings of all tasks share: arguments, trainer, initialization, optimizer groups."""
