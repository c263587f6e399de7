"""
python examples/finetune_detection.py --model_name_or_path MODEL --output_dir runs/mask-rcnn \
    --train_annotations coco/annotations/instances_train2017.json --train_images coco/train2017 \
    --eval_annotations coco/annotations/instances_val2017.json --eval_images coco/val2017 \
    --recipe examples/recipes/detection_base_coco_3x.yaml

From a pre-trained HiViT to Mask R-CNN, Faster R-CNN or Deformable DETR (--detector) on images in COCO's format, with
Trainer. A recipe gives the numbers, flags change them. Writes the model, average precision of boxes and masks, and
detections.png. --resume latest goes on. Several processes:
torchrun --nproc_per_node 8 examples/finetune_detection.py ...
"""

import sys

from hivit_hf.detection.arguments import DetectionRecipe
from hivit_hf.detection.run import DetectionRun
from hivit_hf.training.trainer_old import run_recipe


def main(argv: list[str] | None = None) -> int:
    return run_recipe(DetectionRecipe, DetectionRun, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
