"""
The names and shapes that the original codes give their tensors, written down independently of the converter's tables:
what `test_conversion.py` makes checkpoints of. Entry and parameter counts are those of the real files.
"""

import torch


def linear(name, outputs, inputs, bias=True):
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def mlp_block(name, channels, ratio):
    return {
        **norm(f"{name}.norm2", channels),
        **linear(f"{name}.mlp.fc1", channels * ratio, channels),
        **linear(f"{name}.mlp.fc2", channels, channels * ratio),
    }


def attention_block(name, channels):
    return {
        **norm(f"{name}.norm1", channels),
        **linear(f"{name}.attn.qkv", 3 * channels, channels),
        **linear(f"{name}.attn.proj", channels, channels),
        **mlp_block(name, channels, 4),
    }


def merge(name, channels):
    return {**norm(f"{name}.norm", 4 * channels), **linear(f"{name}.reduction", 2 * channels, 4 * channels, bias=False)}


def encoder(channels, stage1, stage2, main, heads=None, side=14, position="absolute_pos_embed", index=()):
    """
    `heads` set means relative tables; `index` says where their index buffers lie: "model", "block" or both. `stage1`
    and `stage2` count blocks.
    """
    c, n = channels // 4, side * side
    shapes = {position: (1, n, channels), "patch_embed.proj.weight": (c, 3, 4, 4), "patch_embed.proj.bias": (c,)}
    shapes |= norm("patch_embed.norm", c)
    block = 0
    for blocks, width in ((stage1, c), (stage2, 2 * c)):
        for _ in range(blocks):
            shapes |= mlp_block(f"blocks.{block}", width, 3)
            block += 1
        shapes |= merge(f"blocks.{block}", width)
        block += 1
    if heads and "model" in index:
        shapes["relative_position_index"] = (n, n)
    for name in [f"blocks.{number}" for number in range(block, block + main)]:
        shapes |= attention_block(name, channels)
        if heads:
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * side - 1) ** 2, heads)
        if heads and "block" in index:
            shapes[f"{name}.attn.relative_position_index"] = (n, n)
    return shapes


def classifier(channels, classes):
    return {**norm("fc_norm", channels), **linear("head", classes, channels)}


def decoder(channels, features, width, layers, side=14):
    shapes = {"mask_token": (1, 1, width), "decoder_pos_embed": (1, side * side, width)}
    shapes |= norm("norm", features) | linear("decoder_embed", width, features)
    for layer in range(layers):
        shapes |= attention_block(f"decoder_blocks.{layer}", width)
    return shapes | norm("decoder_norm", width) | linear("decoder_pred", 768, width)


def itpn_pyramid(channels):
    """What iTPN-B's pre-training adds to the encoder: the pyramid, and a decoder of 8 layers."""
    width, quarter = 256, channels // 4
    shapes = {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 196, 512)}
    shapes |= linear("align_dim_16tofpn", width, channels)
    for number in range(3):
        shapes |= mlp_block(f"fpn_modules.{number}", width, 4)
    for step, (narrow, wide) in {"16to8": (2 * quarter, 512), "8to4": (quarter, 256)}.items():
        shapes |= linear(f"align_dim_{step}", width, narrow, bias=False)
        shapes |= norm(f"split_{step}.norm", wide) | linear(f"split_{step}.reduction", 1024, wide, bias=False)
        for number in range(2):
            shapes |= mlp_block(f"block_{step}.{number}", width, 4)
    for number, outputs in enumerate((512, 128, 32)):
        shapes |= norm(f"decoder_embed.{number}.0", width) | linear(f"decoder_embed.{number}.1", outputs, width)
    for layer in range(8):
        shapes |= attention_block(f"decoder_blocks.{layer}", 512)
    return shapes | norm("decoder_norm", 512) | linear("decoder_pred", 768, 512)


def prefixed(prefix, shapes):
    return {prefix + name: shape for name, shape in shapes.items()}


def mmpretrain(channels, stage1, stage2, main, heads):
    return encoder(channels, stage1, stage2, main, heads, position="pos_embed", index=("model", "block"))


# name of a real file -> (its tensors, entries, parameters)
FULL_SIZE = {
    "mae_hivit_base_dec512d6b": (encoder(512, 4, 4, 20) | decoder(512, 3584, 512, 6), 381, 87_041_152),
    "hivit_base_finetune": (encoder(512, 4, 4, 20, 8, index=["model"]) | classifier(512, 1000), 324, 66_418_952),
    "supervised_tiny": (encoder(384, 2, 2, 10, 6, index=["block"]) | classifier(384, 1000), 179, 19_181_668),
    "supervised_small": (encoder(384, 4, 4, 20, 6, index=["block"]) | classifier(384, 1000), 343, 37_526_464),
    "supervised_base": (encoder(512, 4, 4, 20, 8, index=["block"]) | classifier(512, 1000), 343, 66_418_952),
    "mmpretrain_tiny": (mmpretrain(384, 2, 2, 10, 6), 176, 18_795_900),
    "mmpretrain_small": (mmpretrain(384, 4, 4, 20, 6), 340, 37_140_696),
    "mmpretrain_base": (mmpretrain(512, 4, 4, 24, 8), 396, 78_537_792),
    "itpn_base_finetune": (encoder(512, 3, 3, 24, 8, index=["model"]) | classifier(512, 1000), 364, 78_557_992),
    "itpn_large_finetune": (encoder(768, 2, 2, 40, 12, index=["model"]) | classifier(768, 1000), 560, 288_493_576),
    "itpn_base_pretrain": (encoder(512, 3, 3, 24) | itpn_pyramid(512), 501, 108_493_344),
}


def index_buffer(side):
    """Row of the relative table for each pair of units, written as loops over them."""
    rows = []
    for query in range(side * side):
        yi, xi = divmod(query, side)
        offsets = [(yi - key // side + side - 1, xi - key % side + side - 1) for key in range(side * side)]
        rows.append([y * (2 * side - 1) + x for y, x in offsets])
    return torch.tensor(rows)


def fill(shapes, dtype=torch.float32, seed=0):
    """Random tensors of these shapes; the index buffers as the original computes them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("relative_position_index"):
            tensors[name] = index_buffer(round(shape[0] ** 0.5))
        else:
            tensors[name] = torch.empty(shape).uniform_(-1, 1, generator=generator).to(dtype)
    return tensors
