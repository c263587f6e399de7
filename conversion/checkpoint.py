"""
Reading a checkpoint as data.

A pickle may name any function to be called while it is read. This reader admits tensors, containers and numbers; every
other class is replaced by an empty stand-in that is never imported, and every other call is not made. Tensors stay in
the file, which is mapped into memory, until they are used.
"""

import hashlib
import pickle
import pickletools
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm


class ConversionError(ValueError):
    """What is wrong with the input, what was found, and what would do."""


@dataclass
class Checkpoint:
    """
    What a file holds.

    Args:
        path: where it is.
        tensors: name -> tensor of the state dict, still in the file.
        entry: the entry of the file that was the state dict, or "" if the whole file is.
        other_entries: what else the file holds, none of which was used.
        classes_left_out: classes that the file names and that were not imported.
        calls_not_made: functions that the file wanted called while it is read.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    entry: str = ""
    other_entries: list[str] = field(default_factory=list)
    classes_left_out: list[str] = field(default_factory=list)
    calls_not_made: list[str] = field(default_factory=list)


# What a state dict is made of; dtypes are admitted besides.
_ADMITTED = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "builtins.complex": complex,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
}

# How ordinary objects are pickled; that they are not made is no sign of anything.
_ORDINARY_CALLS = ("numpy.", "_codecs.encode", "copyreg.", "torch.", "pathlib.", "datetime.", "builtins.getattr")


class _Stub(type):
    """The class of the stand-ins: calling one is noted, and makes an empty object."""

    def __call__(cls, *args, **kwargs):
        cls.notes.calls_not_made.append(cls.name)
        return cls.__new__(cls)


def _make_stub(name: str, notes: Checkpoint) -> type:
    def ignore(self, *args, **kwargs):
        return self

    methods = ["__setitem__", "__setstate__", "append", "extend", "add", "update", "__call__"]
    return _Stub(
        name.rpartition(".")[2],
        (),
        {"name": name, "notes": notes, "__new__": lambda cls, *args, **kwargs: object.__new__(cls)}
        | dict.fromkeys(methods, ignore),
    )


def _pickle_module(notes: Checkpoint) -> types.SimpleNamespace:
    """What `torch.load` takes in place of `pickle`."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            qualified = f"{module}.{name}".replace("__builtin__.", "builtins.")
            if qualified in _ADMITTED:
                return _ADMITTED[qualified]
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            notes.classes_left_out.append(qualified)
            return _make_stub(qualified, notes)

    return types.SimpleNamespace(Unpickler=Unpickler, __name__="tensors_only")


def sha256(path: Path) -> str:
    """Of the file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, _progress(path.stat().st_size, "sha256") as bar:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _progress(size_bytes: int, name: str) -> tqdm:
    return tqdm(total=size_bytes, desc=name, unit="B", unit_scale=True, leave=False, delay=1)


def _check_records(path: Path):
    """Every record of the archive against its checksum, which `torch.load` does not look at."""
    with zipfile.ZipFile(path) as archive, _progress(path.stat().st_size, "checksums") as bar:
        names = [info.filename for info in archive.infolist()]
        if not any(name.endswith("/data.pkl") for name in names):
            raise ConversionError(f"{path} is a zip archive, but no PyTorch checkpoint: it holds no data.pkl.")
        if any(name.endswith("/constants.pkl") for name in names):
            raise ConversionError(
                f"{path} is a TorchScript program, not a checkpoint. Give the state dict it was made of."
            )
        for info in archive.infolist():
            if info.filename.endswith("/data.pkl"):
                _check_pickle(archive.read(info))
            with archive.open(info) as record:
                while chunk := record.read(1 << 22):
                    bar.update(len(chunk))


def _check_pickle(data: bytes):
    """
    ValueError for what a checkpoint has no use for and an unpickler pays for: a slot of its memo far beyond those in
    use makes it claim the memory of all before.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise ValueError(f"memo slot {argument} after {count} operations")
        if opcode.name.startswith("EXT") or opcode.name in ("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise ValueError(f"operation {opcode.name}")


def _read_archive(path: Path, notes: Checkpoint):
    with open(path, "rb") as file:
        start = file.read(8)
    if not start:
        raise ConversionError(f"{path} is empty. Download it again.")
    if not start.startswith(b"PK"):
        raise ConversionError(
            f"{path} is neither a PyTorch checkpoint (1.6 or newer) nor a safetensors file: it begins with {start!r}. "
            "If it should be one, it is damaged; if an older PyTorch wrote it, save it again with a newer one."
        )
    try:
        _check_records(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=_pickle_module(notes))
    except ConversionError:
        raise
    except Exception as error:  # a damaged or hostile archive can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConversionError(f"{path} is damaged and cannot be read ({reason}). Download it again.") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged and cannot be read ({error}). Download it again.") from error


def _is_state_dict(entry) -> bool:
    return (
        isinstance(entry, Mapping)
        and len(entry) > 0
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in entry.items())
    )


def read_checkpoint(path: str | Path, model_ema: bool = False) -> Checkpoint:
    """
    The state dict of a checkpoint file.

    Args:
        path: a file of `torch.save` (PyTorch 1.6 or newer) or of safetensors.
        model_ema: take the moving average of the weights that the file also holds.

    Raises:
        ConversionError: if there is no such file, it is damaged, or it holds no state dict.
    """
    path = Path(path)
    checkpoint = Checkpoint(path, {})
    if not path.is_file():
        raise ConversionError(f"There is no file {path}." if not path.exists() else f"{path} is a folder, not a file.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_archive(path, checkpoint)
    checkpoint.classes_left_out = sorted(set(checkpoint.classes_left_out))
    calls = sorted(set(checkpoint.calls_not_made))
    checkpoint.calls_not_made = [name for name in calls if not name.startswith(_ORDINARY_CALLS)]

    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds no state dict, but a {type(content).__name__}.")
    wanted = ["model_ema", "state_dict_ema"] if model_ema else ["model", "state_dict"]
    found = [entry for entry in wanted if _is_state_dict(content.get(entry))]
    if found:
        checkpoint.entry = found[0]
        checkpoint.other_entries = sorted(str(entry) for entry in content if entry != found[0])
        checkpoint.tensors = dict(content[found[0]])
    elif not model_ema and _is_state_dict(content):
        checkpoint.tensors = dict(content)
    else:
        entries = ", ".join(sorted(map(str, content))[:12]) or "nothing"
        raise ConversionError(f"{path} holds no state dict under {' or '.join(wanted)}; it holds: {entries}.")
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(name.startswith(prefix) for name in checkpoint.tensors):
            checkpoint.tensors = {name.removeprefix(prefix): t for name, t in checkpoint.tensors.items()}
    return checkpoint
