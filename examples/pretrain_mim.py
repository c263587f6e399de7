"""
accelerate launch examples/pretrain_mim.py --config examples/recipes/mae_base_1600ep.yaml \
    --dataset_name DATASET --output_dir runs/mae-base

Masked pre-training on streams: a dataset of the Hub, or a folder of Parquet files, tars or images. It can be killed at
any moment: the same command with --resume_from_checkpoint latest resumes with the next sample. A recipe file gives the
numbers, flags win. --model_name_or_path begins with the weights of a model. Several CPU processes: torchrun
--nproc_per_node 2 examples/pretrain_mim.py ...
"""

import sys
import warnings
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from transformers import set_seed

from hivit_hf.pretraining.arguments import (
    PretrainingArguments,
    PretrainingDataArguments,
    PretrainingModelArguments,
    check_arguments,
)
from hivit_hf.pretraining.checkpoint import Checkpoints, find_resumption
from hivit_hf.pretraining.data import open_stream, read_validation_images
from hivit_hf.pretraining.initialization import complete, initialize_autoencoder
from hivit_hf.pretraining.run import PretrainingRun, make_accelerator
from hivit_hf.pretraining.step import MaskedTraining
from hivit_hf.training.command_line import parse_arguments, run_script
from hivit_hf.training.optim import cosine_learning_rate


def main(argv: list[str] | None = None) -> int:
    classes = (PretrainingModelArguments, PretrainingDataArguments, PretrainingArguments)
    return run_script(pretrain, *parse_arguments(classes, __doc__, argv))


def pretrain(
    model_args: PretrainingModelArguments, data_args: PretrainingDataArguments, training_args: PretrainingArguments
) -> bool:
    """A whole pre-training. Returns whether it got to its end, or was stopped by a signal."""
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata's, in every run
    accelerator = make_accelerator(training_args)
    run = prepare(accelerator, model_args, data_args, training_args)

    # train
    accelerator.init_trackers("hivit")
    finished = run.train()

    # save
    if finished:
        run.save_model()
    run.end()
    return finished


def prepare(
    accelerator: Accelerator,
    model_args: PretrainingModelArguments,
    data_args: PretrainingDataArguments,
    training_args: PretrainingArguments,
) -> PretrainingRun:
    """Everything of a run before its first step."""
    check_arguments(accelerator, model_args, data_args, training_args)
    checkpoints = Checkpoints(
        Path(training_args.output_dir) / "checkpoints",
        accelerator,
        training_args.save_total_limit,
        training_args.keep_every_steps,
    )
    resumed = find_resumption(checkpoints, training_args, data_args, model_args)

    # model
    initialization = initialize_autoencoder(model_args, training_args.seed, resumed)
    model_args, data_args = complete(initialization, model_args, data_args)
    model, config = initialization.model, initialization.model.config
    if training_args.gradient_checkpointing:
        model.gradient_checkpointing_enable()

    # data
    stream = open_stream(data_args, training_args, config, accelerator, resumed)
    validation = read_validation_images(data_args, config, stream, resumed)

    # step
    learning_rate = partial(
        cosine_learning_rate,
        total_steps=training_args.num_steps(data_args.images_per_epoch),
        warmup_steps=training_args.num_warmup_steps(data_args.images_per_epoch),
        base=training_args.peak_learning_rate,
        minimum=training_args.min_learning_rate,
    )
    training = MaskedTraining(
        model,
        accelerator,
        learning_rate,
        training_args.weight_decay,
        (training_args.adam_beta1, training_args.adam_beta2),
        training_args.max_grad_norm,
        training_args.ema_decay,
    )
    set_seed(training_args.seed + accelerator.process_index)  # the same weights, but not the same dropped paths
    run = PretrainingRun(training, stream, validation, checkpoints, resumed, model_args, data_args, training_args)
    for note in initialization.notes:
        run.log.say(note)
    return run


if __name__ == "__main__":
    sys.exit(main())
