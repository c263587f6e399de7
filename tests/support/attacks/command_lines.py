"""Flags and recipe files with numbers far too large, values of wrong types, and nesting without end."""

from collections.abc import Iterator

from support.attacks import Attack
from support.attacks.ground import RECIPES, Ground


PRETRAIN, FINETUNE, EVALUATE = "pretrain_mim", "finetune_classification", "evaluate_classification"
EXTRACT, PROBE = "extract_features", "linear_probe"
SEGMENT, DETECT = "finetune_segmentation", "finetune_detection"
NOWHERE = "holds a NUL character|There is no (model|folder)"
BRACKETS = "[" * 5000
DEEP = '{"a": ' + BRACKETS + "]" * 5000 + "}"

# (script, flag, value, words of the refusal)
FLAGS = [
    *(
        (script, "dataloader_num_workers", value, "dataloader_num_workers must (be at most 256|not be negative), got")
        for script in (PRETRAIN, FINETUNE, EXTRACT, PROBE, SEGMENT, DETECT)
        for value in ("100000", str(10**18), "-1")
    ),
    *((script, "dataloader_num_workers", "nan", "invalid int value: 'nan'") for script in (PRETRAIN, EXTRACT)),
    *(
        (script, "effective_batch_size", str(10**18), "effective_batch_size must be at most 1048576")
        for script in (PRETRAIN, FINETUNE, SEGMENT, DETECT)
    ),
    *((script, "effective_batch_size", "1e18", "invalid int value: '1e18'") for script in (PRETRAIN, FINETUNE)),
    (FINETUNE, "gradient_accumulation_steps", str(10**15), "effective_batch_size"),
    (FINETUNE, "per_device_train_batch_size", str(10**12), "effective_batch_size"),
    (PRETRAIN, "per_device_train_batch_size", str(10**12), "effective_batch_size"),
    *(
        (script, "image_size", value, "image_size must be (at most 32768|a positive number|a.* multiple), got")
        for script in (PRETRAIN, FINETUNE, EXTRACT, PROBE)
        for value in (str(10**12), str(10**400), "0", "-32")
    ),
    *(
        (script, "crop_size", value, "crop_size must be (at most 32768|a positive number), got")
        for script in (SEGMENT, DETECT)
        for value in (str(10**12), str(10**400), "0", "-32")
    ),
    (SEGMENT, "eval_size", str(10**12), "eval_size must be at most 32768"),
    (SEGMENT, "eval_stride", str(10**12), "eval_stride must be at most 32768"),
    (DETECT, "eval_max_size", str(10**12), "eval_max_size must be at most 32768"),
    *(
        (script, "config_overrides", value, "config_overrides must be a JSON object")
        for script in (PRETRAIN, FINETUNE, SEGMENT, DETECT)
        for value in (BRACKETS, DEEP, "{" * 5000, "[1]", "7", "null", '"x"', "{", "nan", "")
    ),
    *(
        (script, "config_overrides", f'{{"depths": {value}}}', "depths")
        for script in (PRETRAIN, FINETUNE)
        for value in ("[100000000, 1, 1]", "[1, 1, 100000000]", "[1e8, 1, 1]", '"x"', "null", "7", '["a", "b", "c"]')
    ),
    *(
        (script, "config_overrides", f'{{"{name}": {value}}}', name)
        for script in (PRETRAIN, FINETUNE)
        for name in ("hidden_size", "num_attention_heads", "mlp_ratio", "patch_size", "decoder_num_hidden_layers")
        for value in (10**12, 10**400, '"x"', "null", "[]", "{}", "NaN", "-Infinity", "Infinity", -1)
    ),
    *(
        (script, "config_overrides", f'{{"{name}": {value}}}', name)
        for script in (PRETRAIN, FINETUNE)
        for name, value in (
            ("num_labels", 10**12),
            ("num_channels", 10**12),
            ("window_size", 10**12),
            ("hidden_act", "[]"),
            ("hidden_act", '"x"'),
            ("out_features", 7),
            ("out_features", "[7]"),
            ("out_indices", '"x"'),
            ("global_attention_layers", 7),
            ("qkv_bias", '"x"'),
            ("depths", "[" * 400 + "]" * 400),
        )
    ),
    *(
        (script, "train_val_split", value, r"train_val_split must be in \(0, 1\), got")
        for script in (FINETUNE, PROBE)
        for value in ("inf", "-inf", "nan", "0", "1", "1e308")
    ),
    *((script, "label_column_name", "image", "'image' .*holds dict values, no labels") for script in (FINETUNE, PROBE)),
    (EVALUATE, "label_column_name", "image", "'image' of .* holds dict values, no labels"),
    (PRETRAIN, "label_column_name", "image", "label_column_name is of the validation images"),
    *(
        (
            script,
            "dataset_name",
            value,
            f"{NOWHERE}|is a file|cannot be read|no dataset|cannot be searched|File name too long",
        )
        for script in (PRETRAIN, FINETUNE, EVALUATE, EXTRACT, PROBE)
        for value in ("a\0b", "/dev/null", "/nowhere", "/dev/zero", "x" * 5000)
    ),
    *((script, "output_dir", "a\0b", "holds a NUL character") for script in (PRETRAIN, FINETUNE, EVALUATE, PROBE)),
    (EXTRACT, "output_file", "a\0b", "holds a NUL character"),
    *(
        (script, "model_name_or_path", value, NOWHERE)
        for script in (EVALUATE, EXTRACT, PROBE)
        for value in ("a\0b", "/dev/null", "/nowhere", "x/y/z", "..", "/", "x" * 5000)
    ),
    (FINETUNE, "optim", "x" * 5000, ""),
    (FINETUNE, "max_steps", "1" * 5000, "invalid int value|digits"),
    (PRETRAIN, "max_steps", "1" * 5000, "invalid int value|digits"),
    (PRETRAIN, "seed", str(2**64), "seed must be in"),
    (PRETRAIN, "shuffle_window", "0", "shuffle_window must be a positive number"),
    (PRETRAIN, "num_train_epochs", "inf", "num_train_epochs must be a positive number"),
    (PRETRAIN, "images_per_epoch", "-5", "images_per_epoch must be a positive number"),
    (PRETRAIN, "resume_from_checkpoint", "/dev/zero", ""),
    (PRETRAIN, "resume_from_checkpoint", "a\0b", "holds a NUL character"),
    (PROBE, "neighbors", "0", "neighbors must be a positive number"),
    (EXTRACT, "per_device_eval_batch_size", "-1", "per_device_eval_batch_size must be a positive number"),
]

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
# (content of a recipe file, words of the refusal)
FILES = [
    ("a: " + BRACKETS, "nested too deeply|cannot be read"),
    ("steps: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply|cannot be read"),
    ("- " * 3000 + "x", "nested too deeply|cannot be read|must hold keys and values"),
    (LAUGHS, "more than 10000 values"),
    ("a: &a [*a]", "cannot be read|more than 10000 values|undefined alias"),
    ("report_to: &a [1, *a]", "cannot be read|more than 10000 values"),
    ("report_to: [-x]", "'-x' in the list report_to: no item can begin with '-', as flags do"),
    ('report_to: ["--seed", "1"]', "'--seed' in the list report_to: no item can begin with '-'"),
    ("report_to: [[tensorboard]]", "a list or mapping within the list report_to"),
    ("report_to: [{a: 1}]", "a list or mapping within the list report_to"),
    ("seed: {a: 1}", "invalid int value"),
    ("seed: [1, 2]", ""),
    ("seed: 1.0e+400", "invalid int value"),
    ("seed: " + "9" * 5000, "cannot be read|digits|invalid int value"),
    ('output_dir: "a\\0b"', "holds a NUL character"),
    ('"a\\0b": 1', "which is no flag"),
    ("? [a, b]\n: 1", "cannot be read|which is no flag"),
    ("? {a: b}\n: 1", "cannot be read"),
    ("1: 2", "which is no flag"),
    ("null: 2", "which is no flag"),
    ("seed: !!python/object/apply:os.system ['touch ran']", "cannot be read"),
    ("seed: !!binary AAAA", "invalid int value"),
    ("seed: 2020-01-01", "invalid int value"),
    ("\0", "cannot be read"),
    ("\x07", "cannot be read"),
    ("seed: 1\n" * 200_000, "has more than 1000000 characters"),
    ("[]", "must hold keys and values, got a list"),
    ("seed", "must hold keys and values, got a str"),
]


def attacks(ground: Ground) -> Iterator[Attack]:
    for number, (script, flag, value, words) in enumerate(FLAGS):
        shown = value if len(value) < 40 else f"{value[:30]}... ({len(value)})"
        yield Attack(f"{script} --{flag} {number}: {shown!r}", script, ground.line(script, **{flag: value}), words)
    path = ground.scratch / "recipe.yaml"
    for text, words in FILES:
        path.write_text(text)
        name = f"recipe {text[:30]!r}" + (f"... ({len(text)})" if len(text) > 30 else "")
        for script in (PRETRAIN, FINETUNE):
            yield Attack(name, script, ground.line(script, config=path), words, never=ground.scratch / "ran")
    for device in ("/dev/zero", "/dev/null", "/", "/proc/self/mem", "a\0b", str(RECIPES)):
        for script in (PRETRAIN, FINETUNE):
            words = "cannot be read|must hold keys and values|holds a NUL character|characters"
            yield Attack(f"recipe {device!r}", script, ground.line(script, config=device), words)
