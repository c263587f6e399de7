"""
python benchmarks/onnx_inference.py [--batch_size 8] [--rounds 9] [--demo demo_output]

Exports the base classifier to ONNX, and times onnxruntime on it beside PyTorch (with SDPA, and with attention written
out), in turn; medians, and ratios round by round. Also the largest differences from PyTorch of all exports of the base
networks with random weights, and, with the output folder of `make demo`, of the demo's models, and the
accuracy that int8 costs its classifier. Writes benchmarks/results/onnx_cpu.json.
"""

import argparse
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from hivit_hf import HiViTConfig, HiViTForImageClassification, HiViTForMaskedImageModeling
from hivit_hf.hub.onnx import OPSET, cpu_session, export_onnx, int8_cost, labeled_images, tasks_of
from hivit_hf.hub.repository import load_folder
from hivit_hf.image_processing import load_processor
from inference import inference
from measure import interleave, summarize, write


OURS = "PyTorch, SDPA"


def differences(model, folder: Path, sizes: tuple[bool, ...] = (False, True)) -> dict[str, dict[str, float]]:
    """The largest difference, the seconds and the megabytes of each export of a model, of fixed and dynamic size."""
    found = {}
    for task in tasks_of(model):
        for dynamic in sizes if task != "reconstruction" else (False,):
            path, start = folder / f"{type(model).__name__}_{task}_{dynamic}.onnx", time.perf_counter()
            difference = export_onnx(model, path, task, dynamic)
            found[f"{task}, {'dynamic' if dynamic else 'fixed'} size"] = {
                "largest_difference": difference,
                "export_and_check_s": time.perf_counter() - start,
                "megabytes": path.stat().st_size / 1e6,
            }
    return found


def speed(model, path: Path, batch_size: int, rounds: int) -> dict:
    """Classification of a batch by onnxruntime and by PyTorch, in turn."""
    session, pixel_values = cpu_session(path), torch.randn(batch_size, 3, 224, 224)
    eager = HiViTForImageClassification(model.config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    contenders = {
        OURS: inference(model, pixel_values, torch.float32),
        "PyTorch, eager": inference(eager, pixel_values, torch.float32),
        "onnxruntime": lambda: session.run(None, {"pixel_values": pixel_values.numpy()}) and None,
    }
    return summarize(interleave(contenders, rounds, f"batch {batch_size}"), OURS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8, help="Batch size of the throughput measurement.")
    parser.add_argument("--rounds", type=int, default=9, help="Number of measured rounds.")
    parser.add_argument(
        "--fixed",
        action="store_const",
        dest="base_sizes",
        const=(False,),
        default=(False, True),
        help="Fixed sizes only for the base networks; dynamic ones take a minute each.",
    )
    parser.add_argument("--demo", type=Path, help="Output folder of `make demo`.")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results = {"opset": OPSET, "onnxruntime": version("onnxruntime"), "batch_size": arguments.batch_size}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        classifier = HiViTForImageClassification(HiViTConfig.from_architecture("base", num_labels=1000)).eval()
        autoencoder = HiViTForMaskedImageModeling(HiViTConfig.from_architecture("base-mae")).eval()
        results["differences"] = {
            "base": differences(classifier, folder, arguments.base_sizes),
            "base-mae": differences(autoencoder, folder, arguments.base_sizes),
        }
        path = folder / "HiViTForImageClassification_classification_False.onnx"
        results["speed"] = speed(classifier, path, arguments.batch_size, arguments.rounds)
        results["speed_batch_1"] = speed(classifier, path, 1, 3 * arguments.rounds)
        if arguments.demo:
            demo = {name: load_folder(arguments.demo / name) for name in ("model", "pretrained")}
            for name, model in demo.items():
                results["differences"][f"demo, {name}"] = differences(model, folder / name)
            path = folder / "model" / "HiViTForImageClassification_classification_False.onnx"
            processor = load_processor(arguments.demo / "model", demo["model"].config)
            images = labeled_images(arguments.demo / "holdout", demo["model"].config, processor)
            results["demo_int8"] = int8_cost(path, folder / "int8.onnx", images)
    print("written:", write("onnx_cpu", results, "cpu"))


if __name__ == "__main__":
    main()
