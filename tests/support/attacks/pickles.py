"""Checkpoint files for the converter that hold what no torch.save writes, behind sound checksums."""

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from support.attacks import Attack


BEGIN = b"\x80\x02"


def copies(function: bytes, container: bytes, number: int = 20_000) -> bytes:
    """Many calls of a function that copies a container of 100,000 items, all kept on the stack."""
    return BEGIN + container + b"q\x000c" + function + b"\nq\x010" + b"h\x01h\x00\x85R" * number + b"."


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


LONG_LIST = b"](" + b"N" * 100_000 + b"e"
LONG_DICT = b"}(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(100_000)) + b"u"
NESTED = b"(t" + b"".join(b"q" + bytes([n]) + b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
STORAGE = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
SAME_HASH = b"".join(
    b"\x8a\x0b" + (number * (2**61 - 1)).to_bytes(11, "little", signed=True) + b"N" for number in range(1, 200_000)
)
WIDE_SHAPE = b"(" + (b"\x8a\x08" + (2**62).to_bytes(8, "little")) * 100_000 + b"t"

# name -> (content of data.pkl, words of the refusal)
PICKLES = {
    "copies of a list": (copies(b"__builtin__\nlist", LONG_LIST), "takes more than 2000000 steps"),
    "copies of a dictionary": (copies(b"__builtin__\ndict", LONG_DICT), "takes more than 2000000 steps"),
    "ordered copies": (copies(b"collections\nOrderedDict", LONG_DICT), "takes more than 2000000 steps"),
    "copies of a text": (copies(b"__builtin__\nlist", text(b"x" * 100_000)), "takes more than 2000000 steps"),
    "20 million operations": (BEGIN + b"N0" * 20_000_000 + b"N.", "takes more than 2000000 steps"),
    "a million lists": (BEGIN + b"(" * 3_000_000 + b".", "takes more than 2000000 steps"),
    "keys of one hash": (BEGIN + b"}(" + SAME_HASH + b"u.", "a key of more than 60 bits"),
    "a nested key": (BEGIN + b"}" + NESTED + b"K\x01s.", "a tuple as a key"),
    "a nested name of a storage": (
        BEGIN + b"(" + STORAGE + NESTED + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        "a storage without a name or a length",
    ),
    "a nested type of a storage": (
        BEGIN + b"(X\x07\x00\x00\x00storage" + NESTED + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        "a storage of unknown type, tuple",
    ),
    "a length that is a list": (
        BEGIN + b"(" + STORAGE + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + LONG_LIST + b"tQ.",
        "a storage without a name or a length",
    ),
    "100,000 dimensions": (
        BEGIN + b"ctorch._utils\n_rebuild_tensor_v2\n((" + STORAGE
        + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x05tQK\x00" + WIDE_SHAPE + b"q\x05h\x05tR.",
        "a tensor of impossible shape",
    ),
    "long names of classes": (
        b"\x80\x04" + text(b"m" * 100_000) + b"\x94" + b"0h\x00h\x00\x93" * 10_000 + b".",
        "a class whose name has 200000 letters",
    ),
    "many names of classes": (
        b"\x80\x04" + text(b"m" * 490) + b"\x94" + b"0h\x00h\x00\x93" * 10_000 + b".",
        "takes more than 2000000 steps",
    ),
    "a memo slot of 2 billion": (BEGIN + b"}r\xff\xff\xff\x7f.", "holds no state dict"),
    "more than fits": (BEGIN + bytes(65 * 2**20), "data.pkl has more than"),
}  # fmt: skip


def write_checkpoint(path: Path, pickled: bytes, folder: str = "archive") -> Path:
    """A file as torch.save writes it, of one pickle and a record of five numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/byteorder", b"little")
        archive.writestr(f"{folder}/data/0", bytes(20))
        archive.writestr(f"{folder}/version", b"3\n")
    return path


def attacks(scratch: Path) -> Iterator[Attack]:
    """Hostile pickles, and state dicts of very many or very long names."""
    scratch.mkdir()
    for number, (name, (pickled, words)) in enumerate(PICKLES.items()):
        path = write_checkpoint(scratch / f"{number}.pth", pickled)
        yield Attack(name, "convert", (path, scratch / "out"), words)
        path.unlink()
    one = torch.zeros(1)
    names = {"blocks": "blocks.0.norm2.bias.{}", "others": "layer.{}.weight", "wrapped": "module._orig_mod.{}"}
    for name, pattern in names.items():
        for entry in ("model", None):
            tensors = {pattern.format(number): one for number in range(200_000)}
            torch.save({entry: tensors} if entry else tensors, scratch / "keys.pth")
            words = "it has 200000 entries, where no HiViT has more than 20000 tensors"
            yield Attack(
                f"200,000 {name} {entry or ''}".strip(), "convert", (scratch / "keys.pth", scratch / "out"), words
            )
    torch.save({"model": {"module." * 100_000 + "x": one}}, scratch / "keys.pth")
    yield Attack(
        "a long name", "convert", (scratch / "keys.pth", scratch / "out"), "This is no HiViT that is known here"
    )
