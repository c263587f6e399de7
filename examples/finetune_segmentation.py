"""
python examples/finetune_segmentation.py --config examples/recipes/segmentation_base_ade20k.yaml \
    --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/ade20k

Trains UPerNet on any HiViT with Trainer, and evaluates mean IoU on images of any size. --config reads a recipe; flags
win. --do_train false only evaluates a segmentation model, for example with --eval_scales 0.5 1.0 1.5 --eval_flip. The
output folder loads with pipeline("image-segmentation"); its overlays.png shows predictions.
Several processes: torchrun --nproc_per_node 2 examples/finetune_segmentation.py ...
"""

import sys
from functools import partial

from transformers import set_seed

from hivit_hf.segmentation.arguments import (
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationTrainingArguments,
    check_together,
)
from hivit_hf.segmentation.data import choose_splits, make_datasets
from hivit_hf.segmentation.initialization import initialize_segmenter
from hivit_hf.segmentation.modeling import predict, segmenter_processor
from hivit_hf.segmentation.trainer import SegmentationTrainer
from hivit_hf.training.command_line import parse_arguments, run_script
from hivit_hf.training.resumption import find_checkpoint, save_arguments


ARGUMENTS = (SegmentationModelArguments, SegmentationDataArguments, SegmentationTrainingArguments)


def train(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    training_args: SegmentationTrainingArguments,
) -> dict[str, float]:
    """Trains and evaluates a segmentation model; returns the metrics."""
    check_together(model_args, training_args)
    checkpoint = find_checkpoint(training_args, model_args, data_args)
    set_seed(training_args.seed)

    # data and model
    splits = choose_splits(data_args, training_args.do_train, training_args.seed)
    initialization = initialize_segmenter(model_args, data_args, training_args.do_train)
    model, config = initialization.model, initialization.model.backbone.config
    mean, std = initialization.statistics(data_args, config.num_channels)
    datasets = make_datasets(splits, data_args, mean, std, training_args.seed)

    # trainer
    trainer = SegmentationTrainer(
        training_args,
        model=model,
        predict=partial(
            predict,
            shorter_side=data_args.eval_size or data_args.crop_size,
            window=data_args.crop_size,
            stride=data_args.eval_stride,
            scales=data_args.eval_scales,
            flip=data_args.eval_flip,
            multiple=config.patch_size,
        ),
        train_dataset=datasets.get("train"),
        eval_dataset=datasets["eval"],
        processing_class=segmenter_processor(data_args.crop_size, mean, std),
    )
    if training_args.show_layer_table:
        trainer.accelerator.print(trainer.layer_table())
        return {}
    save_arguments(training_args, model_args, data_args)

    # train, evaluate, save
    if training_args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    trainer.save_evaluation(metrics)
    trainer.save_overlays()
    if training_args.do_train:
        trainer.save_and_push("image-segmentation", data_args.dataset_name)
    trainer.end()
    return metrics


def main(argv: list[str] | None = None) -> int:
    return run_script(train, *parse_arguments(ARGUMENTS, __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
