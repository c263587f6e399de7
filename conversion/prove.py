"""
python conversion/prove.py GOLDEN_DIR [--set NAME]

Converts recorded checkpoints of the original code through the command line, runs the models that `from_pretrained`
makes of them on the recorded inputs, and prints the largest difference from the recorded outputs and gradients.

Each folder of GOLDEN_DIR holds `checkpoint.pth` or `checkpoint.safetensors`, `io.safetensors` (inputs `in.*`, outputs
`out.*`) and `meta.json`. Exits with 1 if an output differs by more than 1e-5.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import convert
from architecture import block_names
from engine import KEY_MAPS
from hivit_hf import HiViTForImageClassification, HiViTForMaskedImageModeling, HiViTModel
from hivit_hf.modeling_hivit import HiViTModelOutput, HiViTPreTrainedModel


TOLERANCE = 1e-5
Outputs = Iterator[tuple[str, torch.Tensor]]


def run_blocks(
    encoder: HiViTModel, pixel_values: torch.Tensor, **arguments
) -> tuple[dict[int, torch.Tensor], HiViTModelOutput]:
    """The output of every block as the original numbers them, merges included, and the output of the encoder."""
    blocks = {}
    hooks = [
        encoder.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, n=number: blocks.__setitem__(n, output)
        )
        for number, name in enumerate(block_names(encoder.config.stage_layers))
    ]
    output = encoder(pixel_values, output_stage_hidden_states=True, **arguments)
    for hook in hooks:
        hook.remove()
    return blocks, output


def masked_autoencoder(model: HiViTForMaskedImageModeling, recorded: dict[str, torch.Tensor]) -> Outputs:
    images = recorded["in.images"]
    model.config.norm_pix_loss = False
    yield "target_raw", model.target(images)
    model.config.norm_pix_loss = True
    yield "target_norm", model.target(images)
    encoded = model.hivit(images, output_stage_hidden_states=True)
    for stage in range(3):
        yield f"full.hifeat_{stage}", encoded.stage_hidden_states[stage + 1]
    yield "full.latent", read_by_decoder(model, encoded)
    for run in ("mask0", "mask50", "mask75"):
        noise = recorded.get(f"in.{run}.noise")
        if noise is None:
            continue
        model.config.mask_ratio = 1 - recorded[f"out.{run}.ids_keep"].shape[1] / noise.shape[1]
        mask = model.draw_mask(images, noise)
        yield f"{run}.mask", mask
        encoded = model.hivit(images, mask, output_stage_hidden_states=True)
        as_recorded = recorded[f"out.{run}.ids_keep"].argsort(dim=1).argsort(dim=1)  # ours are in raster order
        rows = torch.arange(len(images))[:, None]
        for stage in range(3):
            yield f"{run}.hifeat_{stage}", encoded.stage_hidden_states[stage + 1][rows, as_recorded]
        yield f"{run}.latent", read_by_decoder(model, encoded)[rows, as_recorded]
        output = model(images, noise=noise)
        yield f"{run}.pred", output.logits
        yield f"{run}.loss", output.loss
        model.config.norm_pix_loss = False
        yield f"{run}.loss_no_norm_pix", model(images, noise=noise).loss
        model.config.norm_pix_loss = True
        if any(name.startswith(f"out.{run}.grad.") for name in recorded):
            output.loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    yield f"{run}.grad.{original_name(model, name)}", parameter.grad


def read_by_decoder(model: HiViTForMaskedImageModeling, encoded: HiViTModelOutput) -> torch.Tensor:
    """The original's "latent": the three stages side by side and normalized, or the last as it is."""
    if not model.config.fuse_stages:
        return encoded.last_hidden_state
    return model.decoder.norm(torch.cat([stage.flatten(2) for stage in encoded.stage_hidden_states[1:]], dim=2))


def original_name(model: HiViTPreTrainedModel, name: str) -> str:
    numbers = {block: number for number, block in enumerate(block_names(model.config.stage_layers))}
    return KEY_MAPS["self-supervised"].original_name(name, numbers.get)


def classifier(model: HiViTForImageClassification, recorded: dict[str, torch.Tensor]) -> Outputs:
    blocks, encoded = run_blocks(model.hivit, recorded["in.images"])
    yield "patch_embed", encoded.stage_hidden_states[0]
    for number, output in blocks.items():
        yield f"block.{number}", output
    yield "features", encoded.last_hidden_state
    for stage in range(3):
        yield f"hifeat_{stage}", encoded.stage_hidden_states[stage + 1]
    yield "featmap", encoded.last_hidden_state.unflatten(1, model.config.grid_size).permute(0, 3, 1, 2)
    yield "pooled_mean", encoded.last_hidden_state.mean(dim=1)
    yield "pooled", encoded.pooler_output
    yield "logits", model(recorded["in.images"]).logits
    for norm in [module for module in model.modules() if isinstance(module, nn.LayerNorm)]:
        norm.eps = 1e-5
    yield "eps1e-5.features", model.hivit(recorded["in.images"]).last_hidden_state
    yield "eps1e-5.logits", model(recorded["in.images"]).logits


def dense(model: HiViTModel, recorded: dict[str, torch.Tensor], variants: dict[str, dict]) -> Outputs:
    """
    The pyramid of the dense code: 'H' is taken in the middle of stage 1, 'M' after the first merge, and the other
    levels are the main stage. Position embeddings and tables of other sizes are the recorded ones or made by the
    original's rule, which is not ours. Windows are filled up with zero tokens, as there.
    """
    for variant, how in variants.items():
        levels = how.get("out_indices", ["H"])  # the segmentation code takes 'H' without being told
        if how["with_fpn"] or "padded" in variant or levels[0] != "H":
            continue
        images = recorded[f"in.{how['image']}"]
        changes = {}
        if how.get("rpe") is not None:
            changes["use_relative_position_bias"] = how["rpe"]
        if how.get("window_size"):
            changes |= {"window_size": how["window_size"], "global_attention_layers": how["global_indices"]}
            changes |= {"attend_to_window_padding": True}
        encoder = model_for_size(model, recorded, variant, images.shape[2:], changes)
        blocks, encoded = run_blocks(encoder, images)
        half = encoder.config.depths[0] - 1
        first_merge = encoder.config.stage_layers[0]
        main = encoded.last_hidden_state[:, :, None, None]
        for level, tokens in enumerate((blocks[half], blocks[first_merge], main, main)):
            rows, columns = (length // encoder.config.patch_size for length in images.shape[2:])
            tokens = tokens.unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4)
            yield f"{variant}.feat_{level}", tokens.flatten(4, 5).flatten(2, 3)


def original_positions(table: torch.Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Position embedding for another grid, by the rule of the original's `interpolate_pos_encoding`."""
    if grid == new_grid:
        return table
    image = table[0].t().unflatten(1, grid).unsqueeze(0)
    factors = [(new + 0.1) / length for new, length in zip(new_grid, grid)]
    return nn.functional.interpolate(image, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


def model_for_size(model: HiViTModel, recorded: dict, variant: str, size: tuple[int, int], changes: dict) -> HiViTModel:
    """The same encoder at the size of the images, with the original's position embedding and tables in place."""
    grid = tuple(length // model.config.patch_size for length in size)
    config = type(model.config)(**{**model.config.to_dict(), "image_size": list(size), **changes})
    if config.use_relative_position_bias and config.window_size is not None:
        config.image_size = model.config.image_size  # the tables are those of a window, not of the images
    encoder = HiViTModel(config, add_pooling_layer=False).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in encoder.state_dict()}
    positions = recorded.get(f"out.{variant}.pos_embed")
    if positions is None:
        positions = original_positions(state["position_embeddings"], model.config.grid_size, grid)
    if config.grid_size == grid:
        state["position_embeddings"] = positions
    else:
        encoder.position_embeddings = None
        del state["position_embeddings"]
        encoder.dropout.register_forward_pre_hook(lambda _, inputs: (inputs[0] + positions,))
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    for number, name in enumerate(tables):
        state[name] = recorded.get(f"out.{variant}.rpe_table_{number}", state[name])
    encoder.load_state_dict(state)
    return encoder


def differences(folder: Path, converted: Path, implementation: str = "sdpa") -> dict[str, float]:
    """Largest difference of each recorded output of a golden set from that of the converted model."""
    meta = json.loads((folder / "meta.json").read_text())["spec"]
    recorded = load_file(folder / "io.safetensors")
    family = meta["family"]
    model_class = {"mae": HiViTForMaskedImageModeling, "det": HiViTModel}.get(family, HiViTForImageClassification)
    model = model_class.from_pretrained(converted, attn_implementation=implementation).eval()
    if family == "mae":
        outputs = masked_autoencoder(model, recorded)
    elif family in ("seg", "det"):
        outputs = dense(getattr(model, "hivit", model), recorded, meta["variants"])
    else:
        outputs = classifier(model, recorded)
    found = {}
    for name, output in outputs:
        expected = recorded.get(f"out.{name}")
        if expected is not None:
            found[name] = (output.detach().double() - expected.double()).abs().max().item()
    return found


def convert_set(folder: Path, out_dir: Path) -> int:
    """Through the command line, with the heads that small networks must be told. Returns the exit code."""
    checkpoint = next(path for path in sorted(folder.glob("checkpoint.*")))
    architecture = json.loads((folder / "meta.json").read_text())["spec"]["arch"]
    arguments = [str(checkpoint), str(out_dir)]
    if not architecture.get("rpe", True):
        arguments += ["--num_heads", str(architecture["num_heads"])]
    if "decoder_num_heads" in architecture:
        arguments += ["--decoder_num_heads", str(architecture["decoder_num_heads"])]
    with contextlib.redirect_stdout(io.StringIO()):
        return convert.main(arguments)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="Folder of recorded sets.")
    parser.add_argument("--set", action="append", help="Name of a set to run alone; may be repeated.")
    arguments = parser.parse_args(argv)
    folders = [
        path.parent for path in sorted(arguments.golden.glob("*/meta.json")) if list(path.parent.glob("checkpoint.*"))
    ]
    folders = [folder for folder in folders if not arguments.set or folder.name in arguments.set]
    if not folders:
        parser.error(f"no recorded sets in {arguments.golden}")
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            if convert_set(folder, Path(scratch) / folder.name):
                rows.append(f"| {folder.name} | refused, see above | | |")
                continue
            found = differences(folder, Path(scratch) / folder.name)
            name = max(found, key=found.get)
            worst = max(worst, found[name])
            recorded = [output for output in load_file(folder / "io.safetensors") if output.startswith("out.")]
            gradients = sum(".grad." in output for output in found)
            outputs = f"{len(found) - gradients} of {sum('.grad.' not in output for output in recorded)}"
            rows.append(f"| {folder.name} | {outputs} | {gradients} | {found[name]:.1e} (`{name}`) |")
    print("\n| set | outputs compared | gradients | largest difference |\n|---|---|---|---|")
    print("\n".join(rows))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
