# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
HiViT for Transformers.

Importing this package makes transformers' Auto classes know HiViT. PyTorch and the network are imported when they are
first used.
"""

import importlib

from .auto_registration import register_when_imported


__version__ = "0.1.0"

_MODULE_OF = {
    "ARCHITECTURES": "configuration_hivit",
    "HiViTConfig": "configuration_hivit",
    "HiViTBackbone": "modeling_hivit",
    "HiViTForImageClassification": "modeling_hivit",
    "HiViTForMaskedImageModeling": "modeling_hivit",
    "HiViTModel": "modeling_hivit",
    "HiViTPreTrainedModel": "modeling_hivit",
    "units_to_map": "modeling_hivit",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_when_imported()
