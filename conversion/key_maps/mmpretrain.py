"""
The layout of mmpretrain's classifier (`mmpretrain/models/backbones/hivit.py` of open-mmlab/mmpretrain): another name
for the position embedding, both kinds of index buffers, no norm before the head, and epsilon 1e-5.
"""

from . import Index, KeyMap, prefixed
from .self_supervised import ENCODER


BACKBONE = {("pos_embed" if key == "absolute_pos_embed" else key): name for key, name in ENCODER.items()}
INDICES = {"relative_position_index": Index(), "blocks.{block}.attn.relative_position_index": Index()}

KEY_MAP = KeyMap(
    name="mmpretrain",
    title="HiViT in mmpretrain: classifier or backbone",
    rules={**prefixed("backbone.", {**BACKBONE, **INDICES}), "head.fc.*": "classifier.*"},
    signature=("backbone.patch_embed.proj.weight", "backbone.pos_embed"),
    container="state_dict",
    layer_norm_eps=1e-5,
    pooler_layernorm=False,
)
