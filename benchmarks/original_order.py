"""
HiViT with the original code's order of operations, in the role of that code, which no longer runs.

Same weights, same numbers as the package's classes (tests/test_benchmarks.py holds them to it), another order: all
units are embedded and then the visible ones gathered, merges read four strided slices, attention is written out with a
float32 softmax, and the decoder appends mask tokens and puts the units back in place by gathering. Source:
`models_hivit.py` and `models_hivit_mae.py` of the original code.
"""

import torch
from torch import nn
from transformers import AttentionInterface

from hivit_hf.modeling_hivit import (
    HiViTDecoder,
    HiViTEmbeddings,
    HiViTForMaskedImageModeling,
    HiViTMaskedImageModelingOutput,
    HiViTMerge,
    image_to_pixels,
    visible_indices,
)


class AllUnitsEmbeddings(HiViTEmbeddings):
    def forward(self, pixel_values, visible=None):
        tokens = self.projection(pixel_values)
        batch, channels, height, width = tokens.shape
        tokens = tokens.view(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        tokens = self.norm(tokens.reshape(batch, -1, 4, 4, channels))
        if visible is None:
            return tokens
        return torch.gather(tokens, 1, visible[:, :, None, None, None].expand(-1, -1, 4, 4, channels))


class StridedMerge(HiViTMerge):
    def forward(self, hidden_states):
        x0 = hidden_states[..., 0::2, 0::2, :]
        x1 = hidden_states[..., 1::2, 0::2, :]
        x2 = hidden_states[..., 0::2, 1::2, :]
        x3 = hidden_states[..., 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3], dim=-1)))


class GatheringDecoder(HiViTDecoder):
    def forward(self, hidden_states, visible, grid, **kwargs):
        hidden_states = self.embed(self.norm(hidden_states))
        batch, num_visible, channels = hidden_states.shape
        num_units = grid[0] * grid[1]
        masked = torch.ones(batch, num_units, device=visible.device).scatter(1, visible, 0.0)
        shuffled = masked.argsort(dim=1, stable=True)
        tokens = self.mask_token.repeat(batch, num_units - num_visible, 1)
        tokens = torch.cat([hidden_states, tokens], dim=1)
        restore = shuffled.argsort(dim=1)[:, :, None].repeat(1, 1, channels)
        hidden_states = torch.gather(tokens, 1, restore) + self.position_embeddings
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.head(self.layernorm(hidden_states))


def float32_softmax_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    scores = (query * scaling) @ key.transpose(-2, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores.float(), dim=-1).type_as(value)
    return (nn.functional.dropout(probabilities, dropout) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("float32_softmax", float32_softmax_attention)


class OriginalOrderMaskedImageModeling(HiViTForMaskedImageModeling):
    def forward(self, pixel_values, bool_masked_pos=None, noise=None, **kwargs):
        mask = self.draw_mask(pixel_values, noise)
        num_visible = self.config.num_visible_units(mask.shape[1])
        encoded = self.hivit(pixel_values, mask, num_visible_units=num_visible, output_stage_hidden_states=True)
        latent = torch.cat([stage.flatten(2) for stage in encoded.stage_hidden_states[1:]], dim=-1)
        grid = self.hivit.check_pixel_values(pixel_values)
        logits = self.decoder(latent, visible_indices(mask, num_visible), grid)
        target = image_to_pixels(pixel_values, self.config.patch_size)
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1.0e-6) ** 0.5
        loss = (((logits - target) ** 2).mean(dim=-1) * mask).sum() / mask.sum()
        return HiViTMaskedImageModelingOutput(loss=loss, logits=logits, bool_masked_pos=mask)


def reorder(model):
    """Gives a model of the package the original's order of operations, in place; the weights stay the same objects."""
    for module in model.modules():
        for ours, original in [
            (HiViTEmbeddings, AllUnitsEmbeddings),
            (HiViTMerge, StridedMerge),
            (HiViTDecoder, GatheringDecoder),
            (HiViTForMaskedImageModeling, OriginalOrderMaskedImageModeling),
        ]:
            if type(module) is ours:
                module.__class__ = original
    model.set_attn_implementation("float32_softmax")
    return model
