"""
Key maps: one table per layout in which HiViT checkpoints are published, and their matching in both directions.

A rule maps a name of the layout to a name of the package, or says why there is none. In both names `{block}` is a
block of the encoder (a flat number there, a stage and a layer here), `{layer}` a layer of the decoder, and `*` stands
for `weight` or `bias`. Where a tensor has no counterpart, the pattern may end in `**`, which takes any name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Dropped:
    """A tensor that has no counterpart here, on purpose."""

    reason: str


@dataclass(frozen=True)
class Index:
    """A buffer with the positions of pairs of units: computed here, so only checked, and written on the way back."""

    reason: str = "index buffer, recomputed and found equal"


@dataclass(frozen=True)
class OnlyIf:
    """A tensor that is mapped if a switch of the configuration is on, and dropped otherwise."""

    switch: str
    name: str
    reason: str


Rule = str | Dropped | Index | OnlyIf


@dataclass(frozen=True)
class Match:
    """What a rule says about one key: the name here, with `{block}` and `{layer}` still open, or why there is none."""

    rule: Rule
    name: str | None
    block: int | None = None


@dataclass(frozen=True)
class KeyMap:
    """
    One layout.

    Args:
        name: what `--source` calls it.
        title: what it is, for people.
        rules: the table.
        signature: patterns as in the table, all of which the keys must match for the layout to be recognized.
        container: the entry of the checkpoint file that holds the tensors.
        layer_norm_eps, pooler_layernorm: what this layout implies for the configuration.
    """

    name: str
    title: str
    rules: Mapping[str, Rule]
    signature: tuple[str, ...] = ("patch_embed.proj.weight",)
    container: str = "model"
    layer_norm_eps: float = 1e-6
    pooler_layernorm: bool = True

    def match(self, key: str) -> Match | None:
        """The rule for a key, or None if there is none."""
        for pattern, rule in self._patterns:
            found = pattern.fullmatch(key)
            if found:
                name = rule.name if isinstance(rule, OnlyIf) else rule if isinstance(rule, str) else None
                groups = found.groupdict()
                if name is not None:
                    name = name.replace("*", groups.get("leaf") or "").replace("{layer}", groups.get("layer") or "")
                return Match(rule, name, int(groups["block"]) if groups.get("block") else None)
        return None

    def fits(self, keys: Iterable[str]) -> int:
        """How many of the keys the table knows; 0 if the signature is not there."""
        keys = list(keys)
        if not all(any(compile_pattern(pattern).fullmatch(key) for key in keys) for pattern in self.signature):
            return 0
        return sum(self.match(key) is not None for key in keys)

    def original_name(self, name: str, block_number) -> str | None:
        """
        The inverse of the table: the key of this layout for a name here, or None if the layout has no place for it.

        Args:
            name: the full name here, as in the state dict of a model with a head.
            block_number: gives the flat number of a block from its name here, like `stages.0.layers.1`.
        """
        for source, rule in self.rules.items():
            target = rule.name if isinstance(rule, OnlyIf) else rule
            if not isinstance(target, str):
                continue
            found = compile_pattern(target, block=r"stages\.[0-2]\.(?:layers\.[0-9]+|merge)").fullmatch(name)
            if found:
                groups = found.groupdict()
                source = source.replace("*", groups.get("leaf") or "").replace("{layer}", groups.get("layer") or "")
                return source.replace("{block}", str(block_number(groups["block"])) if groups.get("block") else "")
        return None

    def index_keys(self, attention_blocks: Iterable[int]) -> list[str]:
        """The keys of the index buffers that the original of this layout keeps."""
        keys = []
        for source, rule in self.rules.items():
            if isinstance(rule, Index):
                keys += (
                    [source.replace("{block}", str(b)) for b in attention_blocks] if "{block}" in source else [source]
                )
        return keys

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, Rule]]:
        return [(compile_pattern(source), rule) for source, rule in self.rules.items()]


_NUMBER = "0|[1-9][0-9]{0,3}"  # one way to write each


def compile_pattern(pattern: str, block: str = _NUMBER) -> re.Pattern:
    """The regular expression of a name in a table."""
    parts = {"{block}": f"(?P<block>{block})", "{layer}": f"(?P<layer>{_NUMBER})"}
    parts |= {"**": ".*", "*": "(?P<leaf>weight|bias)"}
    pieces = re.split(r"(\{block\}|\{layer\}|\*\*|\*)", pattern)
    return re.compile("".join(parts.get(piece, re.escape(piece)) for piece in pieces))


def prefixed(prefix: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The same rules for keys that begin with `prefix`."""
    return {prefix + source: rule for source, rule in rules.items()}
