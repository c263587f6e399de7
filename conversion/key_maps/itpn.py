"""
The layout of iTPN's pre-training on pixels (`itpn_pixel/` of sunsmarterjie/iTPN, arXiv 2211.12735): the encoder is a
HiViT; the feature pyramid and its decoder are another network and stay behind.
"""

from . import Dropped, Index, KeyMap
from .self_supervised import DECODER, ENCODER


_PYRAMID = Dropped("feature pyramid of iTPN")
_DECODER = Dropped("decoder of iTPN, which reads its feature pyramid")

KEY_MAP = KeyMap(
    name="itpn-pretraining",
    title="iTPN (pixel), pre-training: its encoder",
    rules={
        **ENCODER,
        "relative_position_index": Index(),
        **{f"{part}.**": _PYRAMID for part in ("fpn_modules", "align_dim_16tofpn")},
        **{f"{part}_{step}.**": _PYRAMID for part in ("align_dim", "split", "block") for step in ("16to8", "8to4")},
        "decoder_embed.**": _DECODER,
        **{key: _DECODER for key in DECODER if key.startswith(("decoder_", "mask_token")) and key != "decoder_embed.*"},
    },
    signature=("patch_embed.proj.weight", "fpn_modules.**"),
)
