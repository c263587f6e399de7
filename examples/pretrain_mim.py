"""
accelerate launch examples/pretrain_mim.py --config examples/recipes/mae_base_1600ep.yaml \
    --dataset_name DATASET --output_dir runs/mae-base

Masked pre-training on streams: a dataset of the Hub, or a folder of Parquet files, tars or pictures. Kill it at any
moment; the same command with --resume latest goes on with the next sample. A recipe file gives the numbers, flags
change them. Several CPU processes: torchrun --nproc_per_node 2 examples/pretrain_mim.py ...
"""

import os
import sys

import datasets
from accelerate import Accelerator

from hivit_hf.training.recipe import PretrainRecipe, parse_recipe
from hivit_hf.training.run import PretrainRun


def main(argv: list[str] | None = None) -> int:
    recipe = parse_recipe(PretrainRecipe, __doc__, argv)
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        dynamo_backend="inductor" if recipe.compile else None,
        log_with=None if recipe.tracker == "none" else recipe.tracker,
        project_dir=recipe.output_dir,
    )
    try:
        run = PretrainRun(recipe, accelerator)
        accelerator.init_trackers("hivit")
        run.train()
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        if accelerator.num_processes == 1:
            print(f"error: {error}", file=sys.stderr)
            return 2
        # The others may wait for this process in a collective: leave at once, and the launcher stops them.
        print(f"error in process {accelerator.process_index}: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    accelerator.wait_for_everyone()  # a process that leaves first may take the others with it
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
