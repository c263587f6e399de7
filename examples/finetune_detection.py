"""
python examples/finetune_detection.py --config examples/recipes/detection_base_coco_3x.yaml \
    --model_name_or_path MODEL --output_dir runs/mask-rcnn \
    --train_annotations coco/annotations/instances_train2017.json --train_image_dir coco/train2017 \
    --eval_annotations coco/annotations/instances_val2017.json --eval_image_dir coco/val2017

Trains Mask R-CNN, Faster R-CNN or Deformable DETR (--detector) on any HiViT with Trainer, on images in COCO's format,
and evaluates average precision of boxes and masks. --config reads a recipe; flags win. --do_train false only evaluates
a detector. The output folder has the model, the metrics and detections.png.
Several processes: torchrun --nproc_per_node 8 examples/finetune_detection.py ...
"""

import sys

from transformers import set_seed

from hivit_hf.detection.arguments import (
    DetectionDataArguments,
    DetectionModelArguments,
    DetectionTrainingArguments,
    check_together,
)
from hivit_hf.detection.data import make_datasets, read_annotations
from hivit_hf.detection.initialization import initialize_detector, make_batches
from hivit_hf.detection.trainer import DetectionTrainer
from hivit_hf.training.command_line import parse_arguments, run_script
from hivit_hf.training.resumption import find_checkpoint, save_arguments


ARGUMENTS = (DetectionModelArguments, DetectionDataArguments, DetectionTrainingArguments)


def make_trainer(
    model_args: DetectionModelArguments, data_args: DetectionDataArguments, training_args: DetectionTrainingArguments
) -> DetectionTrainer:
    """Data, model and trainer."""
    set_seed(training_args.seed)

    # data
    masks, seed = model_args.with_masks, training_args.seed
    annotations = read_annotations(data_args, masks, training_args.do_train)

    # model
    initialization = initialize_detector(model_args, data_args, annotations[1].names, training_args.do_train)
    batches = make_batches(initialization, data_args)

    # trainer
    train_dataset, eval_dataset = make_datasets(annotations, data_args, masks, initialization.image_mean, seed)
    return DetectionTrainer(
        training_args, batches, model=initialization.model, train_dataset=train_dataset, eval_dataset=eval_dataset
    )


def train(
    model_args: DetectionModelArguments, data_args: DetectionDataArguments, training_args: DetectionTrainingArguments
) -> dict[str, float]:
    """Trains and evaluates a detector; returns the metrics."""
    check_together(model_args, data_args, training_args)
    checkpoint = find_checkpoint(training_args, model_args, data_args)
    trainer = make_trainer(model_args, data_args, training_args)
    if training_args.show_layer_table:
        trainer.accelerator.print(trainer.layer_table())
        return {}
    save_arguments(training_args, model_args, data_args)

    # train
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint)

    # evaluate
    metrics = trainer.evaluate()
    trainer.save_evaluation(metrics)
    trainer.save_overlays()

    # save
    if training_args.do_train:
        trainer.save_and_push("object-detection")
    trainer.end()
    return metrics


def main(argv: list[str] | None = None) -> int:
    return run_script(train, *parse_arguments(ARGUMENTS, __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
