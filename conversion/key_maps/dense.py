"""
The layout of the segmentation and detection code (`segmentation/` and `detection/`), as mmcv wraps it: the encoder of
the self-supervised code behind `backbone.`, and heads of another library, which stay behind.
"""

from . import Dropped, Index, KeyMap, prefixed
from .self_supervised import CLASSIFIER, ENCODER


_PYRAMID = Dropped("norm of the detection pyramid, which belongs to the detector")
_HEAD = Dropped("part of the mmsegmentation or mmdetection model around the backbone")
_CLASSIFIER = Dropped("classifier that the dense code keeps but never runs")

KEY_MAP = KeyMap(
    name="dense",
    title="HiViT, segmentation or detection code: backbone",
    rules={
        **prefixed("backbone.", {**ENCODER, "relative_position_index": Index()}),
        **prefixed("backbone.", dict.fromkeys(CLASSIFIER, _CLASSIFIER)),
        **{f"backbone.fpn{level}.**": _PYRAMID for level in (1, 2, 3, 4)},
        **{f"{part}.**": _HEAD for part in ("neck", "rpn_head", "roi_head", "decode_head", "auxiliary_head")},
    },
    signature=("backbone.patch_embed.proj.weight", "backbone.absolute_pos_embed"),
    container="state_dict",
)
