"""
python benchmarks/inference.py [--batch_size 8] [--rounds 9] [--device cpu]

Times classification at 224 px, forward only, of the base models: ours, the same in the original's order of operations,
and transformers' ViT-B, Swin-B and Hiera-B. All in one process, in turn; medians, and ratios round by round. Also how
long `from_pretrained` of our base takes. Writes benchmarks/results/inference_DEVICE.json.

transformers' Hiera has no SDPA path.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch
from transformers import (
    HieraConfig,
    HieraForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hivit_hf import HiViTConfig, HiViTForImageClassification
from measure import PRECISIONS, interleave, summarize, write
from original_order import reorder
from step_time import ORIGINAL, OURS


def hivit():
    return HiViTForImageClassification(HiViTConfig.from_architecture("base", num_labels=1000))


def swin():
    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], num_labels=1000)
    return SwinForImageClassification(config)


def hiera():
    config = HieraConfig(embed_dim=96, depths=[2, 3, 16, 3], num_heads=[1, 2, 4, 8], num_labels=1000)
    return HieraForImageClassification(config)


MODELS = {
    OURS: hivit,
    ORIGINAL: lambda: reorder(hivit()),
    "ViT-B": lambda: ViTForImageClassification(ViTConfig(num_labels=1000)),
    "Swin-B": swin,
    "Hiera-B": hiera,
}


def inference(model, pixel_values: torch.Tensor, dtype: torch.dtype):
    """A function that classifies the images once."""

    def run():
        with (
            torch.inference_mode(),
            torch.autocast(pixel_values.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            model(pixel_values)

    return run


def loading_seconds(repeats: int = 5) -> float:
    """Median seconds of `from_pretrained` of our base classifier, from files that the system has in memory."""
    with tempfile.TemporaryDirectory() as folder:
        hivit().save_pretrained(folder)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            HiViTForImageClassification.from_pretrained(folder)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="Images per call.")
    parser.add_argument("--rounds", type=int, default=9, help="Counted rounds.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Where to run.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pixel_values = torch.randn(arguments.batch_size, 3, 224, 224, device=arguments.device)
    models = {name: make().to(arguments.device).eval() for name, make in MODELS.items()}
    results = {"batch_size": arguments.batch_size, "image_size": 224, "from_pretrained_s": loading_seconds()}
    for precision, dtype in PRECISIONS.items():
        contenders = {name: inference(model, pixel_values, dtype) for name, model in models.items()}
        seconds = interleave(contenders, arguments.rounds, f"classification, {precision}")
        results[precision] = {"models": summarize(seconds, OURS)}
        print(json.dumps(results[precision], indent=1))
    print("written:", write(f"inference_{arguments.device}", results, arguments.device))


if __name__ == "__main__":
    main()
