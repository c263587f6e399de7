"""The layout of the supervised code (`supervised/models/hivit.py`): an index buffer in every attention layer."""

from . import Index, KeyMap
from .self_supervised import CLASSIFIER, ENCODER


KEY_MAP = KeyMap(
    name="supervised",
    title="HiViT, supervised code: classifier",
    rules={**ENCODER, **CLASSIFIER, "blocks.{block}.attn.relative_position_index": Index()},
    signature=("patch_embed.proj.weight", "blocks.{block}.attn.relative_position_index"),
)
