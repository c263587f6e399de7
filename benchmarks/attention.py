"""
python benchmarks/attention.py [--rounds 15]

Times eager attention ("written out") and SDPA on the shapes of the base models at 224 px: why the network replaces SDPA
by eager attention on some CPUs in bfloat16 (`effective_attention`). Writes benchmarks/results/attention.json on CPUs
that multiply bfloat16, attention_avx512.json and attention_avx2.json on others. A CPU with AVX-512 is made one without
by `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`: PyTorch's own kernels, and the
matrix products of both libraries.
"""

import argparse
import json
import os
import statistics

import torch
from torch import nn

from hivit_hf.modeling_hivit import CPU_MULTIPLIES_BFLOAT16, eager_attention_forward
from measure import PRECISIONS, interleave, write


# (batch, units, heads, channels of a head)
SHAPES = {
    "encoder, masked": (8, 49, 8, 64),
    "encoder": (8, 196, 8, 64),
    "decoder": (8, 196, 16, 32),
}


# what limits the instructions of PyTorch, of oneDNN and of MKL
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def sdpa(module, query, key, value, attention_mask, scaling):
    output = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
    return output.transpose(1, 2), None


def contender(attention, shape: tuple[int, int, int, int], dtype: torch.dtype, backward: bool, repeats: int = 5):
    """A function that runs attention `repeats` times on views of one projection, as the network does."""
    batch, units, heads, channels = shape
    qkv = torch.randn(batch, units, 3 * heads * channels, dtype=dtype, requires_grad=backward)
    module = nn.Identity()

    def run():
        for _ in range(repeats):
            parts = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
            output, _ = attention(module, *parts, None, scaling=channels**-0.5)
            if backward:
                output.flatten(2).sum().backward()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="Counted rounds.")
    rounds = parser.parse_args().rounds
    rows = []
    for name, shape in SHAPES.items():
        for precision, dtype in PRECISIONS.items():
            for backward in (True, False):
                contenders = {
                    "written out": contender(eager_attention_forward, shape, dtype, backward),
                    "sdpa": contender(sdpa, shape, dtype, backward),
                }
                seconds = interleave(contenders, rounds, f"{name}, {precision}")
                ratio = statistics.median(s / w for s, w in zip(seconds["sdpa"], seconds["written out"]))
                row = {"shape": name, "precision": precision, "backward": backward, "sdpa_over_written_out": ratio}
                rows.append(row)
                print(json.dumps(row))
    capability = torch.backends.cpu.get_cpu_capability()
    environment = {name: os.environ[name] for name in SWITCHES if name in os.environ}
    results = {"cpu_capability": capability, "environment": environment, "rows": rows}
    bfloat16 = capability == "AVX512" and CPU_MULTIPLIES_BFLOAT16
    name = "attention" if bfloat16 else f"attention_{capability.lower()}"
    print("written:", write(name, results, "cpu"))


if __name__ == "__main__":
    main()
