"""
Reading a checkpoint as data.

A pickle may name any function to be called while it is read. This reader makes tensors, containers and numbers; every
other class is replaced by an empty stand-in that is never imported, and every other call is not made but noted. Tensors
stay in the file, which is mapped into memory, until they are used.

`torch.load(weights_only=True)` is no substitute: it refuses dictionaries of other classes, like the yacs `CfgNode` of
the supervised code, and modules like `os` in any entry; a nested tuple as a key hangs it, `_codecs.encode` and
`bytearray` fill the memory, and with `mmap` it reads records of another length than the pickle claims.
"""

import hashlib
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


# A checkpoint of HiViT-L with optimizer has a pickle of less than 1 MB, 400,000 steps and 3,000 tensors. What is far
# beyond is refused, as a file of a few MB could otherwise fill the memory and take hours.
MAX_PICKLE_BYTES = 64 * 2**20
MAX_STEPS = 2_000_000  # operations of the pickle, and items that they copy
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 16
MAX_NAME_LENGTH = 1000
MAX_RECORDS = 100_000
MAX_WRAPPERS = 4


class ConversionError(ValueError):
    """An input that cannot be converted: what is wrong, what was found, and how to fix it."""


@dataclass
class Checkpoint:
    """
    Contents of a checkpoint file.

    Args:
        path: where it is.
        tensors: name -> tensor of the state dict, still in the file.
        entry: the entry of the file that was the state dict, or "" if the whole file is.
        other_entries: what else the file holds, none of which was used.
        classes_left_out: classes that the file names and that were not imported.
        calls_not_made: functions that the file wanted called while it is read.
    """

    path: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    entry: str = ""
    other_entries: list[str] = field(default_factory=list)
    classes_left_out: list[str] = field(default_factory=list)
    calls_not_made: list[str] = field(default_factory=list)


def shown(text: object, most: int = 80) -> str:
    """Text from a file, fit to be printed: escaped and shortened."""
    text = ascii(text)[1:-1] if isinstance(text, str) else ascii(text)
    return text if len(text) <= most else f"{text[:most]}..."


# -- pickles --------------------------------------------------------------------------------------------------------

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class _Storage:
    """Numbers in the file: their bytes, their type and how many they are."""

    content: torch.UntypedStorage
    dtype: torch.dtype
    length: int


def _rebuild_tensor(storage, offset, size, stride, *_) -> torch.Tensor:
    """A view of a storage, which must lie within it and must not be larger."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    if not len(size) == len(stride) <= MAX_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor of impossible shape")
    if any(type(n) is not int or not 0 <= n < 2**63 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor of impossible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride))
    if math.prod(size) and (last >= storage.length or math.prod(size) > storage.length):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage.content, offset, size, stride)


def _checked_key(key):
    """A key that is hashed at once: nested ones can take for ever, and all multiples of 2^61 - 1 have one hash."""
    if not isinstance(key, (str, int, float, bytes, type(None))):
        raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
    if isinstance(key, int) and not -(2**60) < key < 2**60:
        raise pickle.UnpicklingError("a key of more than 60 bits")
    return key


def _mapping(pairs=(), *_) -> dict:
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return {_checked_key(key): value for key, value in pairs}


# What is made. Attributes, sets and devices have no meaning for a state dict and stay empty.
_ADMITTED = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _mapping,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": lambda *_: set(),
    "builtins.frozenset": lambda *_: set(),
    "builtins.complex": complex,
    "torch.Size": tuple,
    "torch.device": lambda *_: None,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}

_COPIED = (list, tuple, dict, str, bytes)

# How ordinary objects are pickled; that they are not made is no sign of anything.
_ORDINARY_CALLS = {
    "_codecs.encode",
    "copy_reg._reconstructor",  # its name in protocol 2
    "copyreg._reconstructor",
    "datetime.datetime",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
}


class _Dispatch(dict):
    """The methods of an unpickler by opcode, which ends after so many steps."""

    def __init__(self, methods: Mapping[int, Callable]):
        super().__init__(methods)
        self.steps = 0

    def spend(self, steps: int):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise pickle.UnpicklingError(f"its pickle takes more than {MAX_STEPS} steps, far more than any checkpoint")

    def __getitem__(self, opcode: int) -> Callable:
        self.spend(1)
        return super().__getitem__(opcode)


class _StandIn:
    """Takes the place of a class or function that is not admitted, and of what calling it would give."""

    def __init__(self, name: str):
        self.name = name


class _TensorUnpickler(pickle._Unpickler):
    """
    The standard library's unpickler in Python, whose steps can be replaced: it calls nothing that was not meant to be
    called, and its memo is a dictionary, so a large slot number costs nothing.

    Args:
        file: the pickle.
        load_storage: gives the storage for a persistent id.
        notes: where what is left out is written down.
    """

    def __init__(self, file, load_storage, notes: Checkpoint):
        super().__init__(file)
        self.persistent_load, self.notes = load_storage, notes
        self.dispatch = _Dispatch(type(self).dispatch)

    def find_class(self, module: str, name: str):
        if len(module) + len(name) > MAX_NAME_LENGTH:
            raise pickle.UnpicklingError(f"a class whose name has {len(module) + len(name)} letters")
        qualified = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if qualified in _ADMITTED:
            return _ADMITTED[qualified]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        self.dispatch.spend(len(qualified))
        self.notes.classes_left_out.append(qualified)
        return _StandIn(qualified)

    def _instantiate(self, function, arguments):
        self.append(self._call(function, arguments))

    def _call(self, function, arguments):
        if isinstance(function, _StandIn):
            self.notes.calls_not_made.append(function.name)
            return function
        if not any(function is admitted for admitted in _ADMITTED.values()):
            raise pickle.UnpicklingError(f"a {type(function).__name__} is called")
        self.dispatch.spend(sum(len(argument) for argument in arguments if isinstance(argument, _COPIED)))
        return function(*arguments)

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(self._call(function, arguments))

    def load_newobj(self):
        self.stack.pop()
        self._make(self.stack.pop())

    def load_newobj_ex(self):
        del self.stack[-2:]
        self._make(self.stack.pop())

    def _make(self, made_of):
        self.append(made_of if isinstance(made_of, _StandIn) else self._call(made_of, ()))

    def load_build(self):
        self.stack.pop()  # attributes of objects: a state dict's `_metadata`, a Namespace's values

    def load_dict(self):
        items = self.pop_mark()
        self.append(_mapping(zip(items[::2], items[1::2])))

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._update(_mapping([(key, value)]))

    def load_setitems(self):
        items = self.pop_mark()
        self._update(_mapping(zip(items[::2], items[1::2])))

    def _update(self, items: dict):
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(items)

    def load_append(self):
        self._extend([self.stack.pop()])

    def load_appends(self):
        self._extend(self.pop_mark())

    def _extend(self, items: list):
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def load_additems(self):
        self.pop_mark()

    def _refuse(self):
        raise pickle.UnpicklingError("an operation that no checkpoint needs")

    load_frozenset = load_ext1 = load_ext2 = load_ext4 = _refuse
    load_next_buffer = load_readonly_buffer = load_bytearray8 = _refuse


# the base class maps opcodes to its own methods, by value
_TensorUnpickler.dispatch = {
    opcode: getattr(_TensorUnpickler, method.__name__) for opcode, method in pickle._Unpickler.dispatch.items()
}


# -- files ----------------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Of the file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_records(path: Path, archive: zipfile.ZipFile) -> str:
    """Every record of the archive against its checksum. Returns the folder that all of them are in."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not pickles:
        raise ConversionError(f"{path} is a zip archive, but no PyTorch checkpoint: it holds no data.pkl.")
    folder = pickles[0].removesuffix("data.pkl")
    if len(pickles) > 1 or len(set(names)) < len(names):
        raise ConversionError(f"{path} holds records of the same name: no PyTorch writes that.")
    if f"{folder}constants.pkl" in names:
        raise ConversionError(f"{path} is a TorchScript program, not a checkpoint. Give the state dict it was made of.")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise ConversionError(f"{path} was compressed. Unpack it, and pack it again without compression (zip -0).")
    if len(names) > MAX_RECORDS or sum(info.file_size for info in infos) > path.stat().st_size:
        raise ConversionError(f"{path} holds {len(names)} records, more or larger ones than fit in it. Get it again.")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise ConversionError(f"{path} was written on a big-endian machine. Save it again on another.")
    if archive.getinfo(pickles[0]).file_size > MAX_PICKLE_BYTES:
        raise ConversionError(f"{path} is no checkpoint: its data.pkl has more than {MAX_PICKLE_BYTES} bytes.")
    if damaged := archive.testzip():
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
    return folder


def _read_archive(path: Path, notes: Checkpoint) -> object:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            folder = _check_records(path, archive)
            mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

            def load_storage(saved_id):
                kind, dtype, key, _, length = saved_id
                if kind != "storage" or not isinstance(dtype, torch.dtype):
                    raise pickle.UnpicklingError(f"a storage of unknown type, {type(dtype).__name__}")
                if type(key) is not str or type(length) is not int:
                    raise pickle.UnpicklingError("a storage without a name or a length")
                info = archive.getinfo(f"{folder}data/{key}")
                if info.file_size != length * dtype.itemsize:
                    raise pickle.UnpicklingError(f"record {key} has {info.file_size} bytes for {length} numbers")
                file.seek(info.header_offset + 26)  # lengths of name and extra field, which lie before the data
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                return _Storage(mapped[start : start + info.file_size], dtype, length)

            with archive.open(f"{folder}data.pkl") as data:
                return _TensorUnpickler(data, load_storage, notes).load()
    except (ConversionError, OSError):
        raise
    except Exception as error:  # a damaged or hostile archive can raise anything
        reason = shown(str(error) or type(error).__name__)
        raise ConversionError(
            f"{path} cannot be read ({reason}). It is damaged, or was written without checksums: get it again, or save "
            "it again with torch.save."
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, AttributeError, RuntimeError) as error:
        raise ConversionError(f"{path} cannot be read as safetensors ({shown(str(error))}). Get it again.") from error


def _read(path: Path, notes: Checkpoint) -> object:
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise ConversionError(f"{path} is empty. Get it again.")
    if start.startswith(b"PK"):
        return _read_archive(path, notes)
    if start[8:] == b"{" or path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    raise ConversionError(
        f"{path} is neither a PyTorch checkpoint (1.6 or newer) nor a safetensors file: it begins with {start!r}. If "
        "it should be one, it is damaged; if an older PyTorch wrote it, save it again with a newer one."
    )


def _why_no_state_dict(entry: object) -> str | None:
    """None if it is names and tensors."""
    if not isinstance(entry, dict):
        return "it is no dictionary"
    if not entry:
        return "it is empty"
    if len(entry) > MAX_TENSORS:
        return f"it has {len(entry)} entries, where no HiViT has more than {MAX_TENSORS} tensors"
    for name, tensor in entry.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = tensor.name if isinstance(tensor, _StandIn) else type(tensor).__name__
            return f"its {shown(name)!r} is a {shown(kind)}, which is no tensor"
    return None


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
    if path.is_dir():
        raise ConversionError(f"{path} is a folder, not a file.")
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    checkpoint = Checkpoint(path)
    content = _read(path, checkpoint)
    checkpoint.classes_left_out = sorted(set(checkpoint.classes_left_out))
    checkpoint.calls_not_made = sorted(set(checkpoint.calls_not_made) - _ORDINARY_CALLS)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no state dict, but a {type(content).__name__}.")

    wanted = ["model_ema", "state_dict_ema"] if model_ema else ["model", "state_dict"]
    problems = {entry: _why_no_state_dict(content[entry]) for entry in wanted if entry in content}
    found = [entry for entry, problem in problems.items() if problem is None]
    if found:
        checkpoint.entry = found[0]
        checkpoint.other_entries = sorted(shown(entry) for entry in content if entry != found[0])
        content = content[found[0]]
    elif problems:
        reasons = "; ".join(f"{entry}: {problem}" for entry, problem in problems.items())
        raise ConversionError(f"{path} holds no state dict that can be used ({reasons}).")
    elif model_ema or (reason := _why_no_state_dict(content)) is not None:
        held = ", ".join(sorted(map(shown, content))[:12]) or "nothing"
        as_a_whole = "" if model_ema else f"; as a whole, {reason}"
        raise ConversionError(f"{path} holds no state dict under {' or '.join(wanted)}; it holds: {held}{as_a_whole}.")
    checkpoint.tensors = _without_wrappers(content)
    return checkpoint


def _without_wrappers(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without what DistributedDataParallel, torch.compile and averaged models put before them."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    for prefix in ("module.", "_orig_mod.") * MAX_WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
