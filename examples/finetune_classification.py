r"""
python examples/finetune_classification.py --config examples/recipes/finetune_base_100ep.yaml \
    --model_name_or_path MODEL --dataset_name DATASET --output_dir runs/classifier

From a pre-trained HiViT to an image classifier with Trainer: one or several labels per image, or regression; any
dataset with images and labels, or folders (--train_dir, --validation_dir). --config reads a recipe; flags win.
Several processes: torchrun --nproc_per_node 2 examples/finetune_classification.py ...
"""

import sys

from accelerate import PartialState

from hivit_hf.classification.arguments import (
    ClassificationDataArguments,
    ClassificationModelArguments,
    ClassificationTrainingArguments,
    check_together,
)
from hivit_hf.classification.data import make_collator, make_datasets, make_processor, read_labels
from hivit_hf.classification.initialization import add_lora, initialize_classifier
from hivit_hf.classification.trainer import ClassificationTrainer
from hivit_hf.data.datasets import open_splits, train_and_eval
from hivit_hf.training.command_line import parse_arguments, run_script
from hivit_hf.training.resumption import find_checkpoint, save_arguments


ARGUMENTS = (ClassificationModelArguments, ClassificationDataArguments, ClassificationTrainingArguments)


def make_trainer(
    model_args: ClassificationModelArguments,
    data_args: ClassificationDataArguments,
    training_args: ClassificationTrainingArguments,
) -> ClassificationTrainer:
    """Data, model and trainer."""
    check_together(model_args, data_args, training_args)
    seed = training_args.seed

    # data
    opened = open_splits(**data_args.location())
    names = (data_args.train_split_name, data_args.eval_split_name, data_args.train_val_split)
    splits = train_and_eval(opened, *names, seed)
    labels, targets = read_labels(splits, data_args, model_args.problem_type)

    # model
    initialization = initialize_classifier(model_args, labels, training_args)
    model = initialization.model
    for note in initialization.notes:
        PartialState().print(note)
    processor = make_processor(initialization, model.config, data_args)
    train_dataset, eval_dataset = make_datasets(splits, targets, model.config, processor, data_args, seed)
    if model_args.lora_r is not None:
        model = add_lora(model, model_args.lora_r, training_args.hub_model_id or training_args.output_dir)

    # trainer
    return ClassificationTrainer(
        training_args,
        labels,
        model=model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=make_collator(labels, data_args, training_args),
        processing_class=processor,
    )


def train(
    model_args: ClassificationModelArguments,
    data_args: ClassificationDataArguments,
    training_args: ClassificationTrainingArguments,
) -> dict[str, float]:
    """Fine-tunes and evaluates a classifier; returns the metrics."""
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

    # save
    if training_args.do_train:
        if model_args.lora_r is not None and training_args.should_save:  # an adapter lies beside the weights it adapts
            base = initialize_classifier(model_args, trainer.labels, training_args).model
            base.save_pretrained(training_args.output_dir)
        trainer.save_and_push("image-classification", data_args.dataset_name)
    trainer.end()
    return metrics


def main(argv: list[str] | None = None) -> int:
    return run_script(train, *parse_arguments(ARGUMENTS, __doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
