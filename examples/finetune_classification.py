"""
python examples/finetune_classification.py --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/mine \
    --recipe examples/recipes/finetune_base_100ep.yaml

From a pre-trained HiViT to a classifier with Trainer: one or several labels per image, or regression; any dataset
with images and labels. A recipe gives the numbers, flags change them. --show_layer_table prints the learning rate of
each layer and stops. Several processes: torchrun --nproc_per_node 2 examples/finetune_classification.py ...
"""

import sys

from hivit_hf.classification.arguments_old import FinetuneRecipe
from hivit_hf.classification.run_old import FinetuneRun
from hivit_hf.training.trainer_old import run_recipe


def main(argv: list[str] | None = None) -> int:
    return run_recipe(FinetuneRecipe, FinetuneRun, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
