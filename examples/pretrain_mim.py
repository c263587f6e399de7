"""
accelerate launch examples/pretrain_mim.py --config examples/recipes/mae_base_1600ep.yaml \
    --dataset_name DATASET --output_dir runs/mae-base

Masked pre-training on streams: a dataset of the Hub, or a folder of Parquet files, tars or images. Kill it at any
moment; the same command with --resume latest goes on with the next sample. A recipe file gives the numbers, flags
change them. Several CPU processes: torchrun --nproc_per_node 2 examples/pretrain_mim.py ...
"""

import os
import sys
import warnings

import datasets
from accelerate import Accelerator
from accelerate.utils import is_wandb_available

from hivit_hf.pretraining.arguments import PretrainRecipe
from hivit_hf.pretraining.run import PretrainRun
from hivit_hf.training.recipe_old import one_sentence, parse_recipe


def main(argv: list[str] | None = None) -> int:
    recipe = parse_recipe(PretrainRecipe, __doc__, argv)
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's, in every run
    try:
        if recipe.tracker == "wandb" and not is_wandb_available():
            raise ValueError("tracker wandb is not installed: pip install wandb, or give --tracker tensorboard.")
        accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            dynamo_backend="inductor" if recipe.compile else None,
            log_with=None if recipe.tracker == "none" else recipe.tracker,
            project_dir=recipe.output_dir,
        )
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run = PretrainRun(recipe, accelerator)
        accelerator.init_trackers("hivit")
        finished = run.train()
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        if accelerator.num_processes == 1:
            print(f"error: {one_sentence(error)}", file=sys.stderr)
            return 2
        # The others may wait for this process in a collective: leave at once, and the launcher stops them.
        print(f"error in process {accelerator.process_index}: {one_sentence(error)}", file=sys.stderr, flush=True)
        os._exit(2)
    accelerator.wait_for_everyone()  # a process that leaves first may take the others with it
    accelerator.end_training()
    if finished:
        run.finish_upload()
    return 0


if __name__ == "__main__":
    sys.exit(main())
