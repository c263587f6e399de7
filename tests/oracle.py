"""
A slow and obvious HiViT, written from the paper and from what the original code does, to hold the fast one against.

One image at a time, one unit at a time, one token at a time; attention one head and one query at a time. It shares no
code with the package: it reads the package's weights by their names, and its configuration by its numbers. All
operations are differentiable, so gradients can be compared as well.
"""

import math

import torch


class Oracle:
    """
    Args:
        weights: the state dict of a model with the keys `hivit.*`, and `decoder.*` or `classifier.*` if it has them.
        config: its configuration.
    """

    def __init__(self, weights, config):
        self.w, self.c = weights, config

    # -- pieces

    def linear(self, name, x):
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, name, x):
        centered = x - x.sum() / len(x)
        variance = (centered * centered).sum() / len(x)
        return centered / (variance + self.c.layer_norm_eps) ** 0.5 * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def mlp(self, name, x):
        h = self.linear(f"{name}.fc1", x)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        return self.linear(f"{name}.fc2", h)

    def mlp_block(self, name, x):
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def attention_block(self, name, tokens, num_heads, bias, num_zeros=0):
        """`bias(head, i, j)` is added to the score of query i and key j; zeros (before the norm) may follow as keys."""
        projected = [self.linear(f"{name}.attention.qkv", self.norm(f"{name}.norm1", x)) for x in tokens]
        zeros = self.norm(f"{name}.norm1", torch.zeros_like(tokens[0]))
        projected += [self.linear(f"{name}.attention.qkv", zeros)] * num_zeros
        channels = len(tokens[0])
        size = channels // num_heads
        outputs = []
        for i in range(len(tokens)):
            heads = []
            for head in range(num_heads):
                here = slice(head * size, (head + 1) * size)
                query = projected[i][0:channels][here]
                scores = []
                for j in range(len(projected)):
                    key = projected[j][channels : 2 * channels][here]
                    scores.append((query * key).sum() / math.sqrt(size) + bias(head, i, j))
                scores = torch.stack(scores)
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                values = torch.stack([p[2 * channels :][here] for p in projected])
                heads.append((weights[:, None] * values).sum(0))
            outputs.append(tokens[i] + self.linear(f"{name}.attention.proj", torch.cat(heads)))
        return [self.mlp_block(name, x) for x in outputs]

    def unit_pixels(self, image, row, column):
        p = self.c.patch_size
        return image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]

    # -- the encoder

    def unit(self, pixels):
        """One unit (channels, p, p) through stages 1 and 2: its stem, stage 1, stage 2 as grids, and the last token."""
        k = self.c.patch_size // 4
        kernel = self.w["hivit.embeddings.projection.weight"]
        stem = {}
        for r in range(4):
            for c in range(4):
                piece = pixels[:, r * k : (r + 1) * k, c * k : (c + 1) * k]
                token = (kernel * piece).sum((1, 2, 3)) + self.w["hivit.embeddings.projection.bias"]
                stem[r, c] = self.norm("hivit.embeddings.norm", token)
        grids, grid, side = [stem], stem, 4
        for stage in (0, 1):
            for layer in range(self.c.depths[stage] * self.c.early_blocks_per_depth):
                grid = {at: self.mlp_block(f"hivit.stages.{stage}.layers.{layer}", x) for at, x in grid.items()}
            grids.append(grid)
            side //= 2
            name, merged = f"hivit.stages.{stage}.merge", {}
            for r in range(side):
                for c in range(side):
                    four = [grid[2 * r + dr, 2 * c + dc] for dr, dc in ((0, 0), (1, 0), (0, 1), (1, 1))]
                    merged[r, c] = self.linear(f"{name}.reduction", self.norm(f"{name}.norm", torch.cat(four)))
            grid = merged
        return grids, grid[0, 0]

    def encode(self, image, masked=None):
        """
        One image (channels, H, W). `masked` holds a bool per unit, True = masked; masked units are skipped.

        Returns a dict: stem and stage1 (V, 4, 4, C/4), stage2 (V, 2, 2, C/2), stage3 (V, C), in raster order.
        """
        rows, columns = image.shape[1] // self.c.patch_size, image.shape[2] // self.c.patch_size
        home_rows, home_columns = self.c.grid_size
        where = [(r, c) for r in range(rows) for c in range(columns)]
        where = [at for n, at in enumerate(where) if masked is None or not masked[n]]
        units = [self.unit(self.unit_pixels(image, r, c)) for r, c in where]
        tokens = [last for _, last in units]
        if self.c.use_absolute_position_embeddings:
            table = self.w["hivit.position_embeddings"][0].reshape(home_rows, home_columns, -1)
            table = bicubic(table, rows, columns)
            tokens = [x + table[r, c] for x, (r, c) in zip(tokens, where)]
        for layer in range(self.c.depths[2]):
            name = f"hivit.stages.2.layers.{layer}"
            window = None if layer in self.c.global_attention_layers else self.c.window_size
            reach = (rows, columns) if window is None else (window, window)
            keys, table = list(where), None
            if window is not None and self.c.attend_to_window_padding:
                filled = [(r, c) for r in range(rows + -rows % window) for c in range(columns + -columns % window)]
                keys += [at for at in filled if at not in keys]
            if self.c.use_relative_position_bias:
                table = self.w[f"{name}.attention.relative_position_bias_table"]
                table = table.reshape(2 * home_rows - 1, 2 * home_columns - 1, -1)
                table = bicubic(table, 2 * reach[0] - 1, 2 * reach[1] - 1)

            def bias(head, i, j, window=window, reach=reach, keys=keys, table=table):
                (yi, xi), (yj, xj) = keys[i], keys[j]
                if window is not None and (yi // window, xi // window) != (yj // window, xj // window):
                    return torch.tensor(-math.inf)
                return 0 if table is None else table[yi - yj + reach[0] - 1, xi - xj + reach[1] - 1, head]

            tokens = self.attention_block(name, tokens, self.c.num_attention_heads, bias, len(keys) - len(where))
        stages = {"stage3": torch.stack(tokens)}
        for index, stage in enumerate(("stem", "stage1", "stage2")):
            side = 2 if stage == "stage2" else 4
            grids = [unit[0][index] for unit in units]
            stages[stage] = torch.stack(
                [torch.stack([torch.stack([g[r, c] for c in range(side)]) for r in range(side)]) for g in grids]
            )
        return stages

    def pooled(self, image, masked=None):
        tokens = self.encode(image, masked)["stage3"]
        mean = tokens.sum(0) / len(tokens)
        return self.norm("hivit.layernorm", mean) if self.c.pooler_layernorm else mean

    def classify(self, image, masked=None):
        return self.linear("classifier", self.pooled(image, masked))

    # -- masked image modeling

    def predict(self, image, masked):
        """Pixels that the decoder predicts for each unit: (N, p * p * channels), as (row, column, channel)."""
        rows, columns = image.shape[1] // self.c.patch_size, image.shape[2] // self.c.patch_size
        stages = self.encode(image, masked)
        visible = []
        for n in range(len(stages["stage3"])):
            features = stages["stage3"][n]
            if self.c.fuse_stages:
                parts = [stages["stage1"][n].flatten(), stages["stage2"][n].flatten(), features]
                features = self.norm("decoder.norm", torch.cat(parts))
            visible.append(self.linear("decoder.embed", features))
        tokens, next_visible = [], iter(visible)
        for n in range(rows * columns):
            token = self.w["decoder.mask_token"][0, 0] if masked[n] else next(next_visible)
            tokens.append(token + self.sin_cos(n // columns, n % columns).to(token))
        for layer in range(self.c.decoder_num_hidden_layers):
            name, heads = f"decoder.layers.{layer}", self.c.decoder_num_attention_heads
            tokens = self.attention_block(name, tokens, heads, lambda head, i, j: 0)
        return torch.stack([self.linear("decoder.head", self.norm("decoder.layernorm", x)) for x in tokens])

    def sin_cos(self, row, column):
        quarter = self.c.decoder_hidden_size // 4
        angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
        values = [wave(a) for half in angles for wave in (math.sin, math.cos) for a in half]
        return torch.tensor(values, dtype=torch.float64)

    def target(self, image, n):
        columns = image.shape[2] // self.c.patch_size
        pixels = self.unit_pixels(image, n // columns, n % columns).permute(1, 2, 0).flatten()
        if not self.c.norm_pix_loss:
            return pixels
        mean = pixels.sum() / len(pixels)
        variance = ((pixels - mean) ** 2).sum() / (len(pixels) - 1)
        return (pixels - mean) / (variance + 1e-6) ** 0.5

    def loss(self, images, masks):
        """Mean squared error over the masked units of all images."""
        errors = []
        for image, masked in zip(images, masks):
            predicted = self.predict(image, masked)
            for n in range(len(masked)):
                if masked[n]:
                    errors.append(((predicted[n] - self.target(image, n)) ** 2).mean())
        return torch.stack(errors).mean()


def bicubic(table, rows, columns):
    """Cubic convolution (a = -0.75, half-pixel centers, edges repeated) of a (rows, columns, channels) table."""
    if table.shape[:2] == (rows, columns):
        return table

    def weight(distance):
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def resize(lines, length):
        resized = []
        for n in range(length):
            center = (n + 0.5) * len(lines) / length - 0.5
            first = math.floor(center) - 1
            near = [(weight(center - k), lines[min(max(k, 0), len(lines) - 1)]) for k in range(first, first + 4)]
            resized.append(sum(w * line for w, line in near))
        return resized

    lines = [torch.stack(resize(list(row), columns)) for row in table]
    return torch.stack(resize(lines, rows))
