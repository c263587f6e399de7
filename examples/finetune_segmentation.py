"""
python examples/finetune_segmentation.py --config examples/recipes/segmentation_base_ade20k.yaml \
    --model_name_or_path FOLDER --dataset_name DATASET --output_dir runs/ade20k

Fine-tunes a HiViT of any kind as the backbone of UPerNet, and evaluates mean IoU over images of any size. A recipe
gives the numbers, flags change them. --evaluate_only judges a segmenter, for example with --eval_scales 0.5 1.0 1.5
--eval_flip. The folder that it writes loads with pipeline("image-segmentation"); overlays.png shows what it sees.
Several processes: torchrun --nproc_per_node 2 examples/finetune_segmentation.py ...
"""

import sys
from functools import partial
from pathlib import Path

from hivit_hf.segmentation.arguments import SegmentationRecipe
from hivit_hf.segmentation.run import SegmentationRun
from hivit_hf.training.trainer_old import run_recipe


MEAN_IOU = Path(__file__).parent / "metrics" / "mean_iou"


def main(argv: list[str] | None = None) -> int:
    return run_recipe(SegmentationRecipe, partial(SegmentationRun, metric_path=MEAN_IOU), __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
