"""Intern-S1-Pro in double precision, one token, window and head after the other: what the served model is held to.

Written from the formulas alone (the papers' and those that LMDeploy's implementation of the family computes), on NumPy, from
the weights of a checkpoint directory as they lie on disk. It shares no code with Filmstrip or Transformers and knows neither
batches nor caches but the K and V of its own one sequence.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def softmax(values):
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def silu(values):
    return values / (1 + np.exp(-values))


def gelu(values):
    return values * 0.5 * (1 + np.vectorize(math.erf)(values / math.sqrt(2)))


def gelu_tanh(values):
    return 0.5 * values * (1 + np.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))


def relu(values):
    return np.maximum(values, 0)


def layer_norm(values, weight, bias, eps):
    mean = values.mean(axis=-1, keepdims=True)
    variance = ((values - mean) ** 2).mean(axis=-1, keepdims=True)
    return (values - mean) / np.sqrt(variance + eps) * weight + bias


def rms_norm(values, weight, eps):
    return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + eps) * weight


def rotate_half(values):
    half = values.shape[-1] // 2
    return np.concatenate([-values[..., half:], values[..., :half]], axis=-1)


def attention(queries, keys, values, scale, causal):
    """One head: (T, D), (T, D), (T, D) to (T, D)."""
    scores = queries @ keys.T * scale
    if causal:
        scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
    return softmax(scores) @ values


def convolve(inputs, weight, bias, stride, padding):
    """inputs (C, T), weight (O, C, K) to (O, T')."""
    num_channels, length = inputs.shape
    kernel = weight.shape[2]
    padded = np.zeros((num_channels, length + 2 * padding))
    padded[:, padding : padding + length] = inputs
    starts = range(0, length + 2 * padding - kernel + 1, stride)
    columns = [np.tensordot(weight, padded[:, start : start + kernel], axes=([1, 2], [0, 1])) for start in starts]
    return np.stack(columns, axis=1) + bias[:, None]


def hop_of(sampling_rate):
    """Samples between windows, in float32 as the reference model computes it."""
    rate = np.float32(sampling_rate)
    return int(np.floor(np.float32(160) / (np.float32(1) + np.exp(-rate / np.float32(100), dtype=np.float32)) ** 6))


class Reference:
    """One checkpoint."""

    def __init__(self, path):
        self.config = json.loads((Path(path) / "config.json").read_text())
        self.text = self.config["text_config"]
        stored = load_file(Path(path) / "model.safetensors")
        self.weights = {name: weight.astype(np.float64) for name, weight in stored.items()}
        self.weights.setdefault("lm_head.weight", self.weights["model.language_model.embed_tokens.weight"])
        self.keys = [[] for _ in range(self.text["num_hidden_layers"])]
        self.values = [[] for _ in range(self.text["num_hidden_layers"])]

    def linear(self, values, name):
        """``name`` without ``.weight``; its bias, where it has one."""
        result = values @ self.weights[name + ".weight"].T
        return result + self.weights.get(name + ".bias", 0.0)

    def normed(self, values, name, eps):
        return layer_norm(values, self.weights[name + ".weight"], self.weights[name + ".bias"], eps)

    # Language model

    def forget(self):
        """Begin another sequence."""
        self.keys = [[] for _ in self.keys]
        self.values = [[] for _ in self.values]

    def text_rows(self, token_ids):
        return self.weights["model.language_model.embed_tokens.weight"][np.asarray(token_ids)]

    def logits_after(self, rows):
        """Logits after the last of ``rows`` (N, hidden_size), which go on where the sequence is."""
        hidden_states = rows.astype(np.float64)
        for index in range(self.text["num_hidden_layers"]):
            hidden_states = self.decoder_layer(index, hidden_states)
        last = rms_norm(hidden_states[-1], self.weights["model.language_model.norm.weight"], self.text["rms_norm_eps"])
        return self.linear(last, "lm_head")

    def decoder_layer(self, index, hidden_states):
        prefix, eps = f"model.language_model.layers.{index}.", self.text["rms_norm_eps"]
        normed = rms_norm(hidden_states, self.weights[prefix + "input_layernorm.weight"], eps)
        hidden_states = hidden_states + self.self_attention(index, prefix + "self_attn.", normed)
        normed = rms_norm(hidden_states, self.weights[prefix + "post_attention_layernorm.weight"], eps)
        if index in self.text["mlp_only_layers"]:
            gate, up = self.linear(normed, prefix + "mlp.gate_proj"), self.linear(normed, prefix + "mlp.up_proj")
            return hidden_states + self.linear(silu(gate) * up, prefix + "mlp.down_proj")
        return hidden_states + np.stack([self.experts(prefix, token) for token in normed])

    def self_attention(self, index, prefix, normed):
        size, eps = self.text["head_dim"], self.text["rms_norm_eps"]
        num_heads, num_kv_heads = self.text["num_attention_heads"], self.text["num_key_value_heads"]
        first = len(self.keys[index])
        queries = self.linear(normed, prefix + "q_proj").reshape(-1, num_heads, size)
        keys = self.linear(normed, prefix + "k_proj").reshape(-1, num_kv_heads, size)
        values = self.linear(normed, prefix + "v_proj").reshape(-1, num_kv_heads, size)
        queries = rms_norm(queries, self.weights[prefix + "q_norm.weight"], eps)
        keys = rms_norm(keys, self.weights[prefix + "k_norm.weight"], eps)
        outputs = np.zeros_like(queries)
        for token in range(len(normed)):
            cos, sin = self.cos_sin(first + token)
            self.keys[index].append(keys[token] * cos + rotate_half(keys[token]) * sin)
            self.values[index].append(values[token])
            seen_keys, seen_values = np.stack(self.keys[index]), np.stack(self.values[index])
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                query = queries[token, head] * cos[kv_head] + rotate_half(queries[token, head]) * sin[kv_head]
                weights = softmax(seen_keys[:, kv_head] @ query / math.sqrt(size))
                outputs[token, head] = weights @ seen_values[:, kv_head]
        return self.linear(outputs.reshape(len(normed), -1), prefix + "o_proj")

    def cos_sin(self, position):
        """FoPE (num_kv_heads, head_dim); plain rotary positions where the checkpoint has no FoPE."""
        half, rope = self.text["head_dim"] // 2, self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        frequencies = rope.get("rope_theta", self.text["rope_theta"]) ** (-np.arange(half) / half)
        if "fope_sep_head" in rope:
            num_kept = rope.get("fope_num_inv_freq", rope.get("num_inv_freq"))
            longest = self.text["max_position_embeddings"]
            kept = frequencies[:num_kept] if num_kept else frequencies[frequencies > 2 * math.pi / longest]
            tables = []
            for name, values in (("cos_coef", np.cos(position * kept)), ("sin_coef", np.sin(position * kept))):
                table = np.ones((self.text["num_key_value_heads"], half))
                for head, mixture in enumerate(self.weights["model.language_model.rotary_emb." + name]):
                    table[head, : len(kept)] = values @ mixture
                tables.append(np.concatenate([table, table], axis=-1))
            return tables
        angles = np.tile(position * frequencies, (self.text["num_key_value_heads"], 2))
        return np.cos(angles), np.sin(angles)

    def experts(self, prefix, token):
        """The sparse layer for one token (hidden_size,)."""
        probabilities = softmax(token @ self.router(prefix).T)
        num_groups = max(1, self.text.get("router_n_groups") or 1)
        group_size, chosen = len(probabilities) // num_groups, []
        for group in range(num_groups):
            members = probabilities[group * group_size : (group + 1) * group_size]
            best = np.argsort(-members, kind="stable")[: self.text["num_experts_per_tok"] // num_groups]
            chosen += [group * group_size + member for member in best]
        weights = probabilities[chosen]
        if self.text["norm_topk_prob"]:
            weights = weights / weights.sum()
        return sum(weight * self.expert(prefix, index, token) for weight, index in zip(weights, chosen, strict=True))

    def router(self, prefix):
        names = (prefix + "mlp.gate.weight", prefix + "block_sparse_moe.gate.weight")
        return next(self.weights[name] for name in names if name in self.weights)

    def expert(self, prefix, index, token):
        if (fused := prefix + "mlp.experts.gate_up_proj") in self.weights:  # (experts, in, out)
            gate, up = np.split(token @ self.weights[fused][index], 2)
            return (silu(gate) * up) @ self.weights[prefix + "mlp.experts.down_proj"][index]
        own = f"{prefix}block_sparse_moe.experts.{index}."
        return self.linear(
            silu(self.linear(token, own + "gate_proj")) * self.linear(token, own + "up_proj"), own + "down_proj"
        )

    # Vision tower

    def picture_rows(self, patches, grid):
        """Normalised patches (t*h*w, 1536) in merge-block order to (t*h*w/4, hidden_size); frames do not see each other."""
        num_frames, height, width = grid
        frames = patches.reshape(num_frames, height * width, -1)
        return np.concatenate([self.frame_rows(frame, height, width) for frame in frames])

    def frame_rows(self, patches, height, width):
        config, prefix = self.config["vision_config"], "model.visual."
        merge = config["spatial_merge_size"]
        places = [
            (block_row * merge + row, block_column * merge + column)
            for block_row in range(height // merge)
            for block_column in range(width // merge)
            for row in range(merge)
            for column in range(merge)
        ]
        kernel = self.weights[prefix + "patch_embed.proj.weight"]
        hidden_states = patches @ kernel.reshape(len(kernel), -1).T + self.weights[prefix + "patch_embed.proj.bias"]
        hidden_states = hidden_states + np.stack([self.place_vector(*place, height, width) for place in places])
        for index in range(config["depth"]):
            hidden_states = self.vision_block(f"{prefix}blocks.{index}.", hidden_states, places)
        normed = self.normed(hidden_states, prefix + "merger.norm", 1e-6).reshape(len(places) // merge**2, -1)
        return self.linear(gelu(self.linear(normed, prefix + "merger.linear_fc1")), prefix + "merger.linear_fc2")

    def place_vector(self, row, column, height, width):
        """Bilinear between the four neighbours on the learned square grid, whose corners are the picture's."""
        table = self.weights["model.visual.pos_embed.weight"]
        side = round(math.sqrt(len(table)))
        grid = table.reshape(side, side, -1)
        y = row * (side - 1) / (height - 1) if height > 1 else 0.0
        x = column * (side - 1) / (width - 1) if width > 1 else 0.0
        top, left = int(y), int(x)
        bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
        below, beside = y - top, x - left
        upper = grid[top, left] * (1 - beside) + grid[top, right] * beside
        lower = grid[bottom, left] * (1 - beside) + grid[bottom, right] * beside
        return upper * (1 - below) + lower * below

    def vision_block(self, prefix, hidden_states, places):
        num_heads = self.config["vision_config"]["num_heads"]
        normed = self.normed(hidden_states, prefix + "norm1", 1e-6)
        queries, keys, values = np.split(self.linear(normed, prefix + "attn.qkv"), 3, axis=-1)
        size = queries.shape[-1] // num_heads
        quarter = 10000.0 ** (-np.arange(0, size // 2, 2) / (size // 2))
        angles = np.stack([np.tile(np.concatenate([row * quarter, column * quarter]), 2) for row, column in places])
        outputs = np.zeros_like(queries)
        for head in range(num_heads):
            mine = slice(head * size, (head + 1) * size)
            query, key = (
                part[:, mine] * np.cos(angles) + rotate_half(part[:, mine]) * np.sin(angles) for part in (queries, keys)
            )
            outputs[:, mine] = attention(query, key, values[:, mine], size**-0.5, causal=False)
        hidden_states = hidden_states + self.linear(outputs, prefix + "attn.proj")
        normed = self.normed(hidden_states, prefix + "norm2", 1e-6)
        return hidden_states + self.linear(
            gelu_tanh(self.linear(normed, prefix + "mlp.linear_fc1")), prefix + "mlp.linear_fc2"
        )

    # Time series

    def series_rows(self, samples, sampling_rate=None):
        """Samples as they were sent, (T, C) or (T,), to (num_tokens, hidden_size)."""
        samples = np.asarray(samples, np.float64)
        samples = samples[:, None] if samples.ndim == 1 else samples
        samples = ((samples - samples.mean(axis=0)) / (samples.std(axis=0) + 1e-8))[:240_000]
        hop = hop_of(sampling_rate or max(len(samples) / 4, 1))
        window = 2 * hop
        num_windows = math.ceil((len(samples) - window) / hop) + 1
        assert num_windows >= 2
        padded = np.zeros(((num_windows - 1) * hop + window, samples.shape[1]))
        padded[: len(samples)] = samples
        vectors = [
            np.mean(
                [self.window_vector(padded[index * hop : index * hop + window, c]) for c in range(samples.shape[1])], 0
            )
            for index in range(num_windows)
        ]
        pairs = [np.concatenate(vectors[index : index + 2]) for index in range(0, num_windows - 1, 2)]
        features = self.whisper(np.stack(pairs))
        assert len(features) == (num_windows // 2 + 1) // 2
        config, prefix = self.config["ts_config"], "model.time_series.projector."
        assert config["activation_function"] == "gelu"
        normed = self.normed(features, prefix + "layer_norm", 1e-5)
        return self.linear(gelu(self.linear(normed, prefix + "linear_1")), prefix + "linear_2")

    def window_vector(self, window):
        """One channel's samples (P,) to (128,): convolution, positions, one post-norm transformer layer, mean."""
        prefix = "model.time_series.encoder_embed."
        weights = self.weights
        states = relu(convolve(window[None], weights[prefix + "conv.weight"], weights[prefix + "conv.bias"], 1, 2)).T
        for channel in range(0, 128, 2):
            angles = np.arange(len(states)) / 10000.0 ** (channel / 128)
            states[:, channel] += np.sin(angles)
            states[:, channel + 1] += np.cos(angles)
        layer = prefix + "transformer_encoder.layers.0."
        projected = states @ weights[layer + "self_attn.in_proj_weight"].T + weights[layer + "self_attn.in_proj_bias"]
        queries, keys, values = np.split(projected, 3, axis=-1)
        heads = [
            attention(queries[:, h : h + 16], keys[:, h : h + 16], values[:, h : h + 16], 16**-0.5, causal=False)
            for h in range(0, 128, 16)
        ]
        attended = self.linear(np.concatenate(heads, axis=-1), layer + "self_attn.out_proj")
        states = self.normed(states + attended, layer + "norm1", 1e-5)
        hidden = self.linear(relu(self.linear(states, layer + "linear1")), layer + "linear2")
        return self.normed(states + hidden, layer + "norm2", 1e-5).mean(axis=0)

    def whisper(self, steps):
        """(S, 256) to (ceil(S / 2), ts_adapt_out_dim)."""
        config, prefix, weights = self.config["ts_config"], "model.time_series.encoder.", self.weights
        states = self.linear(steps, prefix + "adapt_in").T
        for name, stride in (("conv1", 1), ("conv2", 2)):
            states = gelu(
                convolve(states, weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"], stride, 1)
            )
        states = states.T
        for place, vector in enumerate(weights[prefix + "embed_positions.weight"][: len(states)]):
            states[place] += vector
        for index in range(config["encoder_layers"]):
            states = self.whisper_layer(f"{prefix}layers.{index}.", states, config["encoder_attention_heads"])
        return self.linear(self.normed(states, prefix + "layer_norm", 1e-5), prefix + "adapt_out")

    def whisper_layer(self, prefix, states, num_heads):
        normed = self.normed(states, prefix + "self_attn_layer_norm", 1e-5)
        queries, keys, values = (self.linear(normed, f"{prefix}self_attn.{name}_proj") for name in "qkv")
        size, outputs = queries.shape[-1] // num_heads, np.zeros_like(queries)
        for head in range(num_heads):
            mine = slice(head * size, (head + 1) * size)
            outputs[:, mine] = attention(queries[:, mine], keys[:, mine], values[:, mine], size**-0.5, causal=True)
        states = states + self.linear(outputs, prefix + "self_attn.out_proj")
        normed = self.normed(states, prefix + "final_layer_norm", 1e-5)
        return states + self.linear(gelu(self.linear(normed, prefix + "fc1")), prefix + "fc2")
