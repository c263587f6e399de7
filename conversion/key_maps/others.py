"""Other networks that may be mistaken for a HiViT, recognized by their keys."""

from collections.abc import Iterable

from . import compile_pattern


OTHERS = {
    "Fast-iTPN, a different network: convolutions in the stem, SwiGLU, split q, k and v": [
        "**blocks.{block}.attn.q_proj.weight",
        "**blocks.{block}.mlp.w1.weight",
        "**blocks.{block}.mlp.ffn_ln.weight",
        "**blocks.{block}.reduction.bias",
    ],
    "a plain ViT or its masked autoencoder": ["**cls_token", "**embeddings.cls_token", "vit.embeddings.**"],
    "a Swin Transformer": ["**layers.{layer}.blocks.{block}.**", "**layers.{layer}.downsample.**"],
    "Hiera": ["**encoder.stages.{layer}.layers.{block}.**", "**blocks.{block}.attn.q_pool**"],
    "a ResNet": ["**layer1.{layer}.conv1.weight", "**layer1.{layer}.bn1.weight"],
    "a HiViT of this package: it needs no conversion": ["hivit.**", "stages.{layer}.layers.{block}.mlp.fc1.weight"],
}


def recognize(keys: Iterable[str]) -> str | None:
    """What network the keys belong to, if it is a known one that is not an original HiViT."""
    keys = list(keys)
    for network, patterns in OTHERS.items():
        if any(compile_pattern(pattern).fullmatch(key) for pattern in patterns for key in keys):
            return network
    return None
