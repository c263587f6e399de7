"""
The layout of the self-supervised code (`self_supervised/models/` of zhangxiaosong18/hivit): the masked autoencoder and
the classifier that is fine-tuned from it. An iTPN classifier (arXiv 2211.12735) has the same keys.
"""

from . import Index, KeyMap, OnlyIf


ENCODER = {
    "patch_embed.proj.*": "hivit.embeddings.projection.*",
    "patch_embed.norm.*": "hivit.embeddings.norm.*",
    "absolute_pos_embed": "hivit.position_embeddings",
    "blocks.{block}.norm1.*": "hivit.{block}.norm1.*",
    "blocks.{block}.attn.qkv.*": "hivit.{block}.attention.qkv.*",
    "blocks.{block}.attn.proj.*": "hivit.{block}.attention.proj.*",
    "blocks.{block}.attn.relative_position_bias_table": "hivit.{block}.attention.relative_position_bias_table",
    "blocks.{block}.norm2.*": "hivit.{block}.norm2.*",
    "blocks.{block}.mlp.fc1.*": "hivit.{block}.mlp.fc1.*",
    "blocks.{block}.mlp.fc2.*": "hivit.{block}.mlp.fc2.*",
    "blocks.{block}.norm.*": "hivit.{block}.norm.*",
    "blocks.{block}.reduction.weight": "hivit.{block}.reduction.weight",
}

CLASSIFIER = {"fc_norm.*": "hivit.layernorm.*", "head.*": "classifier.*"}

DECODER = {
    "norm.*": OnlyIf("fuse_stages", "decoder.norm.*", "never applied by the original when only the last stage is read"),
    "decoder_embed.*": "decoder.embed.*",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.position_embeddings",
    "decoder_blocks.{layer}.norm1.*": "decoder.layers.{layer}.norm1.*",
    "decoder_blocks.{layer}.attn.qkv.*": "decoder.layers.{layer}.attention.qkv.*",
    "decoder_blocks.{layer}.attn.proj.*": "decoder.layers.{layer}.attention.proj.*",
    "decoder_blocks.{layer}.norm2.*": "decoder.layers.{layer}.norm2.*",
    "decoder_blocks.{layer}.mlp.fc1.*": "decoder.layers.{layer}.mlp.fc1.*",
    "decoder_blocks.{layer}.mlp.fc2.*": "decoder.layers.{layer}.mlp.fc2.*",
    "decoder_norm.*": "decoder.layernorm.*",
    "decoder_pred.*": "decoder.head.*",
}

KEY_MAP = KeyMap(
    name="self-supervised",
    title="HiViT, self-supervised code: masked autoencoder or classifier; also an iTPN (pixel) classifier",
    rules={**ENCODER, **CLASSIFIER, **DECODER, "relative_position_index": Index()},
)
