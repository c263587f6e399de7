"""
torchrun --nproc_per_node 2 tests/parallel_run.py DATA OUTPUT MAX_STEPS [--fsdp | --zero STAGE [--lose_write]]

A pre-training of the smoke recipe up to a step, from the latest checkpoint on if there is one.
"""

import argparse
import errno
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from hivit_hf.pretraining.arguments import PretrainRecipe
from hivit_hf.pretraining.run import PretrainRun
from hivit_hf.training.recipe_old import read_recipe
from support.parallel_steps import make_accelerator


SMOKE = Path(__file__).parents[2] / "examples" / "recipes" / "smoke_cpu.yaml"


def failing(save):
    def attempt(thing, file, *arguments, **options):
        if "step-00000005" in str(file) and "zero_pp_rank_1" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(thing, file, *arguments, **options)

    return attempt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="Folder with images.")
    parser.add_argument("output", help="Where the run goes.")
    parser.add_argument("max_steps", type=int, help="Steps until it stops.")
    parser.add_argument("--fsdp", action="store_true", help="Shard with FSDP2 instead of copying with DDP.")
    parser.add_argument("--zero", type=int, choices=(1, 2), help="Shard with DeepSpeed.")
    parser.add_argument("--lose_write", action="store_true", help="A full disk in the last process, in step 5.")
    arguments = parser.parse_args()
    accelerator = make_accelerator(arguments.fsdp, arguments.zero)
    numbers = {"images_per_epoch": 48, "epochs": 8, "checkpoint_every_steps": 5, "log_samples": True, "batch_size": 4}
    numbers |= {"dataset_name": [arguments.data], "output_dir": arguments.output, "monitor_images": 16}
    numbers |= {"max_steps": arguments.max_steps, "resume": "latest", "drop_path_rate": 0.1}
    numbers |= {"ema_decay": 0.9} if arguments.zero else {}
    run = PretrainRun(PretrainRecipe(**{**read_recipe(SMOKE), **numbers}), accelerator)
    assert any(type(module).__name__.startswith("FSDP") for module in run.training.model.modules()) == arguments.fsdp
    with patch("torch.save", failing(torch.save)) if arguments.lose_write else nullcontext():
        run.train()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
