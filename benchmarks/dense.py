"""
python benchmarks/dense.py [--rounds 3] [--sizes 640x640 800x1344] [--relative_bias] [--device cpu]

Times backbones at the sizes of segmentation and detection, one image, forward only, float32: ours with attention
among all units, ours with the windows of the published detector, transformers' Swin-B, and a plain ViT-B. All in one
process, in turn; medians, and ratios round by round. Also what tensors take at most, beyond the weights: forward alone,
and forward and backward. --relative_bias gives ours the bias that the published segmenter has and the detector has not.
Writes benchmarks/results/dense_DEVICE.json, or dense_bias_DEVICE.json.
"""

import argparse
import json

import torch
from transformers import SwinBackbone, SwinConfig, ViTConfig, ViTModel

from hivit_hf import HiViTBackbone, HiViTConfig
from hivit_hf.training.initialization import pyramid_config
from measure import interleave, peak_allocated_mib, summarize, write


WINDOWS, GLOBAL = "HiViT-B, windows", "HiViT-B, global"
DETECTOR = {"window_size": 14, "global_attention_layers": [4, 9, 14, 19]}


def hivit(bias: bool, **changes) -> HiViTBackbone:
    config = HiViTConfig.from_architecture("base", use_relative_position_bias=bias)
    return HiViTBackbone(pyramid_config(config, **changes))


def swin() -> SwinBackbone:
    levels = [f"stage{level}" for level in (1, 2, 3, 4)]
    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], out_features=levels)
    return SwinBackbone(config)


def models(bias: bool, size: tuple[int, int]) -> dict[str, torch.nn.Module]:
    return {
        WINDOWS: hivit(bias, **DETECTOR),
        GLOBAL: hivit(bias),
        "Swin-B": swin(),
        "ViT-B": ViTModel(ViTConfig(image_size=size), add_pooling_layer=False),
    }


def maps(output) -> list[torch.Tensor]:
    """The maps of a backbone; a plain ViT has tokens only."""
    return list(output.feature_maps) if "feature_maps" in output else [output.last_hidden_state]


def forward(model: torch.nn.Module, pixel_values: torch.Tensor):
    with torch.inference_mode():
        maps(model(pixel_values))


def step(model: torch.nn.Module, pixel_values: torch.Tensor):
    sum(level.square().mean() for level in maps(model(pixel_values))).backward()
    model.zero_grad()


def peak_mib(run, model: torch.nn.Module, pixel_values: torch.Tensor) -> float:
    """The most that tensors take during `run`, beyond what they took before."""
    if pixel_values.device.type == "cpu":
        return peak_allocated_mib(lambda: run(model, pixel_values))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(model, pixel_values)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(size: tuple[int, int], rounds: int, bias: bool, device: str) -> dict:
    torch.manual_seed(0)
    pixel_values = torch.randn(1, 3, *size, device=device)
    contenders = {name: model.to(device).eval() for name, model in models(bias, size).items()}
    runs = {name: lambda model=model: forward(model, pixel_values) for name, model in contenders.items()}
    seconds = interleave(runs, rounds, f"{size[0]}x{size[1]}")
    rows = summarize(seconds, WINDOWS)
    for name, model in contenders.items():
        rows[name]["peak_forward_mib"] = peak_mib(forward, model, pixel_values)
        rows[name]["peak_step_mib"] = peak_mib(step, model, pixel_values)
    return rows


def size_of(text: str) -> tuple[int, int]:
    height, width = (int(length) for length in text.split("x"))
    if height % 16 or width % 16:
        raise argparse.ArgumentTypeError(f"height and width must be multiples of 16, got {text}")
    return height, width


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="Counted rounds.")
    parser.add_argument("--sizes", type=size_of, nargs="+", default=[(640, 640), (800, 1344)], help="HEIGHTxWIDTH.")
    parser.add_argument("--relative_bias", action="store_true", help="Give ours the relative position bias.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Where to run.")
    arguments = parser.parse_args()
    results = {"batch_size": 1, "precision": "float32", "relative_bias": arguments.relative_bias}
    for size in arguments.sizes:
        rows = measure(size, arguments.rounds, arguments.relative_bias, arguments.device)
        results[f"{size[0]}x{size[1]}"] = {"models": rows}
        print(json.dumps(rows, indent=1))
    name = f"dense{'_bias' if arguments.relative_bias else ''}_{arguments.device}"
    print("written:", write(name, results, arguments.device))


if __name__ == "__main__":
    main()
