"""
python benchmarks/step_time.py [--batch_size 8] [--rounds 7] [--device cpu]

Times one masked step, forward + backward, of the base models: ours, the same in the original's order of operations,
and the ones in transformers that a user would take instead. All in one process, in turn; medians, and ratios round by
round. Peak memory is that of all tensors beyond the weights. Writes benchmarks/results/step_time_DEVICE.json.

transformers' Hiera has no SDPA path; its mask ratio is its own published 0.6.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import (
    HieraConfig,
    HieraForPreTraining,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from measure import PRECISIONS, interleave, matrix_product, peak_allocated_mib, summarize, synchronize, write
from original_order import reorder


OURS, ORIGINAL = "HiViT-B", "HiViT-B, original order"
# Operations of one masked step of base-mae at 224 px, forward + backward, per image: all its matrix products.
STEP_GFLOP = 47.7


def hivit():
    return HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae"))


def swin():
    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], encoder_stride=32)
    return SwinForMaskedImageModeling(config)


def hiera():
    decoder = {"decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    config = HieraConfig(embed_dim=96, depths=[2, 3, 16, 3], num_heads=[1, 2, 4, 8], mask_ratio=0.6, **decoder)
    return HieraForPreTraining(config)


MODELS = {
    OURS: hivit,
    ORIGINAL: lambda: reorder(hivit()),
    "ViTMAE-B": lambda: ViTMAEForPreTraining(ViTMAEConfig()),
    "Swin-B SimMIM": swin,
    "Hiera-B MAE": hiera,
}


def masked_step(model, pixel_values: torch.Tensor, dtype: torch.dtype):
    """A function that runs one forward + backward and returns its seconds."""
    inputs = {"pixel_values": pixel_values}
    if isinstance(model, SwinForMaskedImageModeling):
        units = torch.rand(len(pixel_values), 7, 7, device=pixel_values.device) < 0.6  # SimMIM masks 32 px squares
        inputs["bool_masked_pos"] = units.repeat_interleave(8, 1).repeat_interleave(8, 2).flatten(1)

    def run() -> float:
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        with torch.autocast(pixel_values.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        synchronize()
        return time.perf_counter() - start

    return run


def peak_memory_mib(model, pixel_values: torch.Tensor, dtype: torch.dtype) -> float:
    """What one step needs beyond the model itself, MiB: gradients and activations."""
    run = masked_step(model, pixel_values, dtype)
    model.zero_grad(set_to_none=True)
    if not pixel_values.is_cuda:
        return peak_allocated_mib(run)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="Images per step.")
    parser.add_argument("--rounds", type=int, default=7, help="Number of measured rounds.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Device.")
    arguments = parser.parse_args()
    batch_size, device = arguments.batch_size, arguments.device
    torch.manual_seed(0)
    results = {"batch_size": batch_size, "image_size": 224, "step_gflop_per_image": STEP_GFLOP}
    pixel_values = torch.randn(batch_size, 3, 224, 224, device=device)
    models = {name: make().to(device).train() for name, make in MODELS.items()}
    for precision, dtype in PRECISIONS.items():
        contenders = {name: masked_step(model, pixel_values, dtype) for name, model in models.items()}
        contenders["matrix product"] = matrix_product(dtype, device)
        seconds = interleave(contenders, arguments.rounds, f"masked step, {precision}")
        product = seconds.pop("matrix product")
        rates = [2 * 2048**3 / s / 1e9 for s in product]
        fractions = [STEP_GFLOP * batch_size / s / rate for s, rate in zip(seconds[OURS], rates)]
        table = summarize(seconds, OURS)
        for name, model in models.items():
            table[name]["peak_memory_mib"] = peak_memory_mib(model, pixel_values, dtype)
        results[precision] = {
            "models": table,
            "matrix_product_gflop_per_s": statistics.median(rates),
            "fraction_of_matrix_product_rate": statistics.median(fractions),
        }
        print(json.dumps(results[precision], indent=1))
    print("written:", write(f"step_time_{device}", results, device))


if __name__ == "__main__":
    main()
