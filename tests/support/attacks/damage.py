"""Sound checkpoint files that were damaged at random: the converter refuses each, or no number of it changes."""

import random
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import convert
from support.attacks import Attack
from support.original_layouts import classifier, encoder, fill


NUMBER = 200  # of each kind of file
SHAPES = encoder(32, 1, 1, 1, heads=2, side=2, index=["block"]) | classifier(32, 3)


def main(arguments: list[str]) -> int:
    """Converts a damaged file; what comes of it must be what comes of the sound one."""
    path, out, sound = map(Path, arguments)
    code = convert.main([str(path), str(out)])
    if code == 0:
        found, wanted = (load_file(folder / "model.safetensors") for folder in (out, sound))
        if found.keys() != wanted.keys() or any(not torch.equal(found[name], wanted[name]) for name in wanted):
            print(f"numbers of {path} have changed", file=sys.stderr)
            return 3
    return code


def write_sound(path: Path) -> dict[str, torch.Tensor]:
    """Writes the checkpoint of a small network, and returns its tensors."""
    tensors = fill(SHAPES)
    torch.save({"model": tensors}, path)
    return tensors


def damaged(content: bytes, end: int, chance: random.Random) -> tuple[str, bytes]:
    """A damage to a file before byte `end`, by name, and the file with it."""
    first, length = chance.randrange(end), chance.choice((1, 8, 512, 4096))
    last = min(first + length, end)
    kind = chance.choice(("bit", "bit", "bit", "zeros", "noise", "cut", "hole", "twice"))
    if kind == "bit":
        changed = bytearray(content)
        changed[first] ^= 1 << chance.randrange(8)
        return f"a bit of byte {first}", bytes(changed)
    between = {"zeros": bytes(last - first), "noise": chance.randbytes(last - first), "twice": 2 * content[first:last]}
    rest = b"" if kind == "cut" else content[last:]
    return f"{kind} from byte {first} to {last}", content[:first] + between.get(kind, b"") + rest


def attacks(scratch: Path) -> Iterator[Attack]:
    """Damaged files of `torch.save`, and headers of safetensors, whose numbers have no checksums; always the same."""
    scratch.mkdir()
    save_file(write_sound(scratch / "sound.pth"), scratch / "sound.safetensors")
    with redirect_stdout(None):
        assert convert.main([str(scratch / "sound.pth"), str(scratch / "sound")]) == 0
    for suffix in ("pth", "safetensors"):
        content, chance = (scratch / f"sound.{suffix}").read_bytes(), random.Random(0)
        end = len(content) if suffix == "pth" else 8 + int.from_bytes(content[:8], "little")
        for number in range(NUMBER):
            name, changed = damaged(content, end, chance)
            path = scratch / f"damaged.{suffix}"
            path.write_bytes(changed)
            arguments = (path, scratch / f"out {suffix} {number}", scratch / "sound")
            yield Attack(f"{suffix} {number}, {name}", "support.attacks.damage", arguments, may_pass=True)
