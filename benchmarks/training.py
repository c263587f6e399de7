"""
python benchmarks/training.py [--batch_size 256] [--rounds 20] [--device cuda]

Whole training steps of base-mae, optimizer included, on images in memory: as examples/pretrain_mim.py
takes them (bfloat16, compiled), against the same weights as the original takes them (float16 autocast with a gradient
scaler, not compiled, its order of operations and its written-out softmax). In one process, in turn; medians, and ratios
round by round. Writes benchmarks/results/training_DEVICE.json: images per second, fraction of the device's own
matrix-product rate, and peak memory.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from accelerate import Accelerator

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.pretraining.step import MaskedTraining
from hivit_hf.training.optim import parameter_groups
from measure import interleave, matrix_product, peak_allocated_mib, summarize, write
from original_order import reorder
from step_time import STEP_GFLOP


OURS, ORIGINAL = "bfloat16, compiled", "as the original: float16, not compiled"
LEARNING_RATE = 1e-4


def masked_autoencoder() -> HiViTForMaskedImageModeling:
    return HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae")).train()


def our_step(pixel_values: torch.Tensor) -> Callable[[], None]:
    """The step of a pre-training run."""
    accelerator = Accelerator(mixed_precision="bf16", dynamo_backend="inductor", cpu=not pixel_values.is_cuda)
    training = MaskedTraining(masked_autoencoder(), accelerator, lambda step: LEARNING_RATE)

    def run():
        training.step(0, [{"pixel_values": pixel_values}])

    return run


def original_step(pixel_values: torch.Tensor) -> Callable[[], None]:
    """The step of the original's `engine_pretrain.py`."""
    device = pixel_values.device.type
    model = reorder(masked_autoencoder()).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=LEARNING_RATE, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(device)

    def run():
        with torch.autocast(device, dtype=torch.float16):
            loss = model(pixel_values).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return run


def peak_memory_mib(run: Callable[[], None], device: str) -> float:
    """Peak memory of a step beyond what is allocated before it (weights and optimizer), MiB."""
    if device == "cpu":
        return peak_allocated_mib(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=256, help="Images per step.")
    parser.add_argument("--rounds", type=int, default=20, help="Number of measured rounds.")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="Where to run.")
    arguments = parser.parse_args()
    batch_size, device = arguments.batch_size, arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use: give --device cpu and a --batch_size of 4 or so.")
    torch.manual_seed(0)
    pixel_values = torch.randn(batch_size, 3, 224, 224, device=device)
    memory, contenders = {}, {}
    for name, make in {OURS: our_step, ORIGINAL: original_step}.items():
        contenders[name] = make(pixel_values)
        for _ in range(3):
            contenders[name]()
        memory[name] = peak_memory_mib(contenders[name], device)
    size = 8192 if device == "cuda" else 2048
    contenders["matrix product"] = matrix_product(torch.bfloat16, device, size)
    seconds = interleave(contenders, arguments.rounds, "training steps")
    rates = [2 * size**3 / s / 1e9 for s in seconds.pop("matrix product")]
    table = summarize(seconds, OURS)
    for name, row in table.items():
        row["images_per_s"] = batch_size / row["median_s"]
        row["peak_memory_mib"] = memory[name]
        fractions = [STEP_GFLOP * batch_size / s / rate for s, rate in zip(seconds[name], rates)]
        row["fraction_of_matrix_product_rate"] = statistics.median(fractions)
    results = {"batch_size": batch_size, "image_size": 224, "step_gflop_per_image": STEP_GFLOP, "steps": table}
    results["matrix_product_gflop_per_s"] = statistics.median(rates)
    print(json.dumps(results, indent=1))
    print("written:", write(f"training_{device}", results, device))


if __name__ == "__main__":
    main()
