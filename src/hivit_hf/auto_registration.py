# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Registers HiViT with transformers' Auto classes at the moment those are imported.

Their own `register` methods need the classes at hand, and with them PyTorch: seconds that an `import hivit_hf` should
not take. So each registration waits until the module with its Auto classes has been imported, by whomever.
"""

import importlib.abc
import importlib.machinery
import sys


# Auto class -> model class
AUTO_MODELS = {
    "AutoModel": "HiViTModel",
    "AutoModelForPreTraining": "HiViTForMaskedImageModeling",
    "AutoModelForMaskedImageModeling": "HiViTForMaskedImageModeling",
    "AutoModelForImageClassification": "HiViTForImageClassification",
    "AutoBackbone": "HiViTBackbone",
}
# the same for folders that are loaded with trust_remote_code=True
AUTO_MAP = {"AutoConfig": "configuration_hivit.HiViTConfig"}
AUTO_MAP |= {auto: f"modeling_hivit.{model_class}" for auto, model_class in AUTO_MODELS.items()}


def _register_config(auto):
    from .configuration_hivit import HiViTConfig

    auto.AutoConfig.register(HiViTConfig.model_type, HiViTConfig, exist_ok=True)


def _register_models(_module):
    """Runs when transformers' modeling_auto and our network are both there: the latter imports the former."""
    if getattr(getattr(sys.modules.get(_NETWORK), "__spec__", None), "_initializing", False):
        return
    import transformers.models.auto.modeling_auto as auto

    from . import modeling_hivit as hivit
    from .configuration_hivit import HiViTConfig

    for auto_class, model_class in AUTO_MODELS.items():
        getattr(auto, auto_class).register(HiViTConfig, getattr(hivit, model_class), exist_ok=True)
        getattr(hivit, model_class).register_for_auto_class(auto_class)  # saved with its code
    hivit.HiViTPreTrainedModel.auto_map = AUTO_MAP


def _register_image_processor(auto):
    from transformers import BitImageProcessorPil
    from transformers.utils import is_torchvision_available

    from .configuration_hivit import HiViTConfig

    # a backend that is not registered is reported as not available, though another is taken
    classes = {"pil": BitImageProcessorPil}
    if is_torchvision_available():
        from transformers import BitImageProcessor

        classes["torchvision"] = BitImageProcessor
    auto.AutoImageProcessor.register(HiViTConfig, image_processor_classes=classes, exist_ok=True)


_NETWORK = f"{__package__}.modeling_hivit"
_REGISTRATIONS = {
    _NETWORK: _register_models,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
}


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader does, then registers HiViT with what it defines."""

    def __init__(self, loader: importlib.abc.Loader, register):
        self.loader, self.register = loader, register

    def create_module(self, spec: importlib.machinery.ModuleSpec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader
        module.__spec__._initializing = False
        self.register(module)


class _RegisteringFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_REGISTRATIONS`, once each, with a loader that registers HiViT."""

    def __init__(self):
        self.waiting = dict(_REGISTRATIONS)

    def find_spec(self, fullname, path, target=None):
        register = self.waiting.pop(fullname, None)
        if register is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, register)
        return spec


def register_when_imported():
    """Register HiViT with the Auto classes that are imported, and arrange it for those that are not yet."""
    finder = _RegisteringFinder()
    for name in _REGISTRATIONS:
        if name in sys.modules:
            finder.waiting.pop(name)(sys.modules[name])
    if finder.waiting:
        sys.meta_path.insert(0, finder)
