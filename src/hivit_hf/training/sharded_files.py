# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""
Checkpoints of `torch.distributed.checkpoint`, which FSDP writes, tried before they are loaded.

Its reader unpickles the index (`.metadata`) and all that is no tensor without any limit. Here both are read first with
one: classes of the index, and what `torch.load(weights_only=True)` makes.
"""

import io
import pickle
from pathlib import Path, PurePosixPath

import torch


_METADATA = "torch.distributed.checkpoint.metadata"
# what an index is made of; names of modules are not enough, as these import others
CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (_METADATA, "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class IndexUnpickler(pickle.Unpickler):
    """Makes the classes of an index, types of numbers, and nothing else."""

    def find_class(self, module: str, name: str):
        if (module, name) in CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is named, which no index needs")


def check_sharded(folder: Path):
    """
    Tries what is pickled in a folder of `torch.distributed.checkpoint`.

    Raises:
        Exception: of many classes, for what cannot be read, or only by calling what it names.
    """
    with open(folder / ".metadata", "rb") as file:
        index = IndexUnpickler(file).load()
    for key, place in index.storage_data.items():
        if type(index.state_dict_metadata[key.fqn]).__name__ != "BytesStorageMetadata":
            continue  # a tensor, which the reader loads weights-only
        if PurePosixPath(place.relative_path).name != place.relative_path:
            raise pickle.UnpicklingError(f"the index names the file {place.relative_path}")
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
