"""Samples of one time series in, its embeddings out, for Intern-S1-Pro's time-series encoder; knows no prompts.

Overlapping windows of the series, each channel for itself, become one vector each (:class:`WindowEncoder`); two neighbours
together are a step of Whisper's encoder, here causal, which halves their number; a projector leads to the language model.
Written like Transformers' modules; names are those of the checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from filmstrip.models.interns1_pro_config import InternS1ProTimeSeriesConfig

WINDOW_DIM = 128
"""Size of a window's vector; as all that follows here, no checkpoint says another."""
NUM_WINDOW_HEADS = 8
MAX_WINDOW_SAMPLES = 20_000
"""Length of the table of positions in a window."""
MAX_SAMPLES_PER_FORWARD = 1 << 13
"""Samples of all windows and channels that are encoded at once, which bounds memory (windows and channels do not see each
other until their vectors are there, so the result is the same)."""


class WindowPositions(nn.Module):
    """Adds sines and cosines of the place in the window (``sinusoids``)."""

    def __init__(self) -> None:
        super().__init__()
        self.pe = nn.Buffer(sinusoids(MAX_WINDOW_SAMPLES, WINDOW_DIM).unsqueeze(1), persistent=True)

    def reset(self) -> None:
        """Set the table, which checkpoints may leave out."""
        self.pe.copy_(sinusoids(MAX_WINDOW_SAMPLES, WINDOW_DIM).unsqueeze(1))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """(window_length, batch, WINDOW_DIM) to the same."""
        return samples + self.pe[: len(samples)].to(samples.dtype)


class WindowEncoder(nn.Module):
    """One vector for each window: a convolution and a transformer layer over its samples, then the mean.

    Channels go through it one by one and their vectors are averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, WINDOW_DIM, kernel_size=5, padding=2)
        layer = nn.TransformerEncoderLayer(WINDOW_DIM, NUM_WINDOW_HEADS)
        self.transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pos_encoder = WindowPositions()

    def forward(self, samples: torch.Tensor, hop: int) -> torch.Tensor:
        """Samples (num_samples, num_channels) to (num_windows, WINDOW_DIM).

        Windows of ``2 * hop`` samples begin ``hop`` apart; the last is filled up with zeros.
        """
        num_samples, num_channels = samples.shape
        length, num_windows = 2 * hop, count_windows(num_samples, hop)
        padded = F.pad(samples, (0, 0, 0, (num_windows - 1) * hop + length - num_samples))
        windows = padded.unfold(0, length, hop)  # (num_windows, num_channels, length), a view
        step = max(1, MAX_SAMPLES_PER_FORWARD // (length * num_channels))
        return torch.cat([self._encode(part) for part in windows.split(step)])

    def _encode(self, windows: torch.Tensor) -> torch.Tensor:
        """(W, num_channels, length) to (W, WINDOW_DIM)."""
        num_windows, num_channels, length = windows.shape
        rows = windows.reshape(-1, 1, length).split(max(1, MAX_SAMPLES_PER_FORWARD // length))
        vectors = torch.cat([self._encode_rows(part) for part in rows])
        return vectors.view(num_windows, num_channels, WINDOW_DIM).mean(1)

    def _encode_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(R, 1, length), a channel of a window each, to (R, WINDOW_DIM)."""
        hidden_states = F.relu(self.conv(rows)).permute(2, 0, 1)
        return self.transformer_encoder(self.pos_encoder(hidden_states)).mean(0)


class TimeSeriesEncoder(nn.Module):
    """Whisper's encoder with an adapter at either end; each step sees itself and those before."""

    def __init__(self, config: InternS1ProTimeSeriesConfig) -> None:
        super().__init__()
        width = config.d_model
        self.adapt_in = nn.Linear(config.ts_adapt_in_dim, config.num_mel_bins)
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList([_encoder_layer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(width)
        self.adapt_out = nn.Linear(width, config.ts_adapt_out_dim)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """(num_steps, ts_adapt_in_dim) to (ceil(num_steps / 2), ts_adapt_out_dim).

        Steps beyond the table of positions get none.
        """
        channels = self.adapt_in(steps).T.unsqueeze(0)
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(channels)))).transpose(1, 2)
        positions = self.embed_positions.weight[: hidden_states.shape[1]]
        hidden_states[:, : len(positions)] += positions
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=None)
        return self.adapt_out(self.layer_norm(hidden_states[0]))


class TimeSeriesProjector(nn.Module):
    """From the encoder's size to the language model's."""

    def __init__(self, config: InternS1ProTimeSeriesConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.ts_hidden_dim)
        self.linear_1 = nn.Linear(config.ts_hidden_dim, config.out_hidden_size)
        self.act = ACT2FN[config.activation_function]
        self.linear_2 = nn.Linear(config.out_hidden_size, config.out_hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(num_tokens, ts_hidden_dim) to (num_tokens, out_hidden_size)."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(features))))


class TimeSeriesModel(nn.Module):
    """The whole way of one series; series of any number go through it one by one."""

    def __init__(self, config: InternS1ProTimeSeriesConfig) -> None:
        super().__init__()
        self.encoder_embed = WindowEncoder()
        self.encoder = TimeSeriesEncoder(config)
        self.projector = TimeSeriesProjector(config)

    def forward(self, samples: torch.Tensor, hop: int) -> torch.Tensor:
        """Normalised samples (num_samples, num_channels) to (num_tokens, out_hidden_size).

        ``hop`` samples lie between the beginnings of neighbouring windows. There must be at least two windows; the last of
        an odd number is not used.
        """
        vectors = self.encoder_embed(samples, hop)
        pairs = vectors[: len(vectors) // 2 * 2].reshape(-1, 2 * WINDOW_DIM)
        return self.projector(self.encoder(pairs))


def count_windows(num_samples: int, hop: int) -> int:
    """Windows of ``2 * hop`` samples, ``hop`` apart, that cover a series of ``num_samples`` samples."""
    return max(0, -(-(num_samples - 2 * hop) // hop) + 1)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """float32 (length, width): sine and cosine by turns, of frequencies that fall from 1 to 1/10000 (Vaswani et al.)."""
    places = torch.arange(length, dtype=torch.float32, device="cpu").unsqueeze(1)
    evens = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    angles = places * torch.exp(evens * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


def _encoder_layer(config: InternS1ProTimeSeriesConfig) -> WhisperEncoderLayer:
    layer = WhisperEncoderLayer(config)
    attention = layer.self_attn
    attention.is_causal = True
    # Whisper has no bias here; one in a checkpoint is used, and without one it stays 0.
    attention.k_proj = nn.Linear(attention.embed_dim, attention.embed_dim)
    return layer
