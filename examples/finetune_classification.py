"""
python examples/finetune_classification.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/mine \
    --recipe examples/recipes/finetune_base_100ep.yaml

From a pre-trained HiViT to a classifier with Trainer: one or several labels per picture, or regression; any dataset
with pictures and labels. A recipe gives the numbers, flags change them. --show_layer_table prints the learning rate of
each layer and stops. Several processes: torchrun --nproc_per_node 2 examples/finetune_classification.py ...
"""

import os
import sys

import datasets
import torch
import transformers
from accelerate import PartialState

from hivit_hf.training.finetune import FinetuneRun
from hivit_hf.training.finetune_recipe import FinetuneRecipe
from hivit_hf.training.recipe import parse_recipe


def main(argv: list[str] | None = None) -> int:
    recipe = parse_recipe(FinetuneRecipe, __doc__, argv)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    state = PartialState(cpu=not torch.accelerator.is_available())  # else each process on CPUs would train alone
    try:
        run = FinetuneRun(recipe, say=state.print)
        if recipe.show_layer_table:
            state.print(run.layer_table())
            return 0
        state.print(f"processes: {state.num_processes}, parameters: {run.model.num_parameters():,}")
        run.train()
    except (ValueError, RuntimeError, FloatingPointError, OSError) as error:
        # an error of a loader's worker comes with its traceback; the last line is what happened
        sentence = (
            (str(error).strip() or type(error).__name__)
            .splitlines()[-1]
            .removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
        )
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        if state.num_processes > 1:
            os._exit(2)  # the others may wait for this process in a collective; the launcher stops them
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
