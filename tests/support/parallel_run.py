"""
torchrun --nproc_per_node 2 tests/support/parallel_run.py DATA OUTPUT STOP_AFTER_STEPS [--fsdp]

A pre-training of the smoke recipe up to a step, from the latest checkpoint on if there is one.
"""

import argparse
from pathlib import Path

import pretrain_mim
from hivit_hf.pretraining.arguments import PretrainingArguments, PretrainingDataArguments, PretrainingModelArguments
from hivit_hf.training.command_line import parse_arguments
from support.parallel_steps import make_accelerator


SMOKE = Path(__file__).parents[2] / "examples" / "recipes" / "smoke_cpu.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Folder of images.")
    parser.add_argument("output", help="Output folder of the run.")
    parser.add_argument("stop_after_steps", type=int, help="Step after which the run stops.")
    parser.add_argument("--fsdp", action="store_true", help="Shard with FSDP2 instead of copying with DDP.")
    arguments = parser.parse_args()
    accelerator = make_accelerator(arguments.fsdp)
    flags = {"images_per_epoch": 48, "num_train_epochs": 8, "save_steps": 5, "log_samples": True}
    flags |= {"per_device_train_batch_size": 4, "dataset_name": arguments.data, "output_dir": arguments.output}
    flags |= {"max_eval_samples": 16, "stop_after_steps": arguments.stop_after_steps, "drop_path_rate": 0.1}
    flags |= {"resume_from_checkpoint": "latest", "config": SMOKE}
    classes = (PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments)
    parsed = parse_arguments(classes, __doc__, [f"--{name}={value}" for name, value in flags.items()])
    run = pretrain_mim.prepare(accelerator, *parsed)
    assert any(type(module).__name__.startswith("FSDP") for module in run.training.model.modules()) == arguments.fsdp
    if run.train():
        run.save_model()
    run.end()


if __name__ == "__main__":
    main()
