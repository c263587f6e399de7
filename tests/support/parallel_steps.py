"""
torchrun --nproc_per_node 2 tests/support/parallel_steps.py OUTPUT [--fsdp] [--clip] [--bf16]

Takes a few steps of masked training on fixed batches, each rank on its part, and writes losses and final weights.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from hivit_hf import HiViTConfig, HiViTForMaskedImageModeling
from hivit_hf.pretraining.step import MaskedTraining
from hivit_hf.training.optim import cosine_learning_rate


NETWORK = {"image_size": 64, "hidden_size": 64, "depths": [1, 1, 2], "num_attention_heads": 2}
NETWORK |= {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def use_fsdp2(mixed_precision: str = "no"):
    """Accelerate refuses FSDP on CPUs; its own FSDP2 path runs there once the type is set."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["HiViTAttentionLayer"],
        reshard_after_forward=True,
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)  # as Accelerate does
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def make_accelerator(fsdp: bool, mixed_precision: str = "no") -> Accelerator:
    """One on CPUs."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    if fsdp:
        use_fsdp2(mixed_precision)
        assert accelerator.is_fsdp2
    return accelerator


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Folder of losses and weights.")
    parser.add_argument("--fsdp", action="store_true", help="Shard with FSDP2 instead of copying with DDP.")
    parser.add_argument("--clip", action="store_true", help="Clip at a norm that the gradients exceed.")
    parser.add_argument("--bf16", action="store_true", help="Mixed precision.")
    arguments = parser.parse_args()
    max_grad_norm = 0.05 if arguments.clip else 1.0
    accelerator = make_accelerator(arguments.fsdp, "bf16" if arguments.bf16 else "no")
    torch.manual_seed(0)
    model = HiViTForMaskedImageModeling(HiViTConfig(**NETWORK))
    learning_rate = partial(cosine_learning_rate, total_steps=8, warmup_steps=2, base=1e-3)
    training = MaskedTraining(model, accelerator, learning_rate, max_grad_norm=max_grad_norm)
    kinds = {type(module).__name__ for module in training.model.modules()}
    assert any(kind.startswith("FSDP") for kind in kinds) == arguments.fsdp
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(8):
        pixels, noise = (torch.randn(shape, generator=generator) for shape in ((16, 3, 64, 64), (16, 16)))
        rank, world = accelerator.process_index, accelerator.num_processes
        batches = [
            {"pixel_values": p[rank::world], "noise": n[rank::world]} for p, n in zip(pixels.split(8), noise.split(8))
        ]
        if step == 4:  # changes nothing, and leaves nothing behind
            nothing = float("nan") if rank == world - 1 else 1.0
            broken = [{**batch, "pixel_values": batch["pixel_values"] * nothing} for batch in batches]
            assert math.isnan(training.step(step, broken).loss)
        losses.append(training.step(step, batches, stop=step == 5 and rank == world - 1))
    assert [result.stop for result in losses] == [step == 5 for step in range(8)]
    assert training.is_finite()
    assert (max(result.gradient_norm for result in losses) > max_grad_norm) == arguments.clip
    weights = accelerator.get_state_dict(training.model)
    if accelerator.is_main_process:
        arguments.output.mkdir()
        save_file({name: w.contiguous().clone() for name, w in weights.items()}, arguments.output / "model.safetensors")
        (arguments.output / "losses.json").write_text(json.dumps([result.loss for result in losses]))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
