"""Packed hidden states of one step in, gated DeltaNet layers' outputs out, states of all requests kept in slots.

Transformers' own forward takes a packed batch for one sequence, so neighbours would run into each other. Here the
projections, weights and norms are Transformers' modules; the convolution and the delta rule know where each request begins.
It knows no model around the layers and no scheduler.

Sources of the formulas: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (arXiv:2412.06464) and, for
the chunked form, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv:2406.06484).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from filmstrip.models.batch import Batch

MAX_CHUNK_TOKENS = 64
"""Tokens whose updates of the state are worked out together: matrices of this size, then one product with the state."""
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class DeltaShape:
    """The sizes of gated DeltaNet layers; all layers are alike."""

    num_layers: int
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int

    @property
    def num_channels(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def bytes_per_request(self, dtype: torch.dtype) -> int:
        """Memory of one state over all layers."""
        window = (self.kernel_size - 1) * self.num_channels * dtype.itemsize
        return self.num_layers * (window + self.num_value_heads * self.key_dim * self.value_dim * 4)


class DeltaStates:
    """For every slot and layer the last inputs of the convolution and the fp32 matrix that the delta rule updates.

    ``windows`` is (num_layers, num_slots, kernel_size - 1, num_channels) in the model's dtype, ``matrices`` is (num_layers,
    num_slots, num_value_heads, key_dim, value_dim) in fp32: rounding it to 16 bits after every token would add up.
    """

    def __init__(self, shape: DeltaShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.allocate(0)

    def allocate(self, num_slots: int) -> None:
        """Make ``num_slots`` slots of unknown content: memory that no request has used yet is not touched."""
        shape = self.shape
        self.windows = torch.empty(
            (shape.num_layers, num_slots, shape.kernel_size - 1, shape.num_channels),
            dtype=self.dtype,
            device=self.device,
        )
        self.matrices = torch.empty(
            (shape.num_layers, num_slots, shape.num_value_heads, shape.key_dim, shape.value_dim),
            dtype=torch.float32,
            device=self.device,
        )

    def copy(self, source: int, target: int) -> None:
        """Copy one slot's state to another slot, for every layer."""
        for states in (self.windows, self.matrices):
            states[:, target].copy_(states[:, source])

    def begin(self, batch: Batch) -> DeltaStep:
        """Prepare the forward pass of ``batch``; ValueError if it names no slots."""
        if batch.state_slots is None:
            raise ValueError("a batch for a model with recurrent states must say where they are")
        return DeltaStep(self, batch, batch.state_slots)


class DeltaStep:
    """One forward pass: which rows belong to which request has been worked out once, for all layers.

    Requests with one token take the recurrent step, all of them at once. The others are cut into chunks: what happens within
    chunks is computed for all chunks of all requests together, and then the n-th chunks of all requests meet their states.
    """

    def __init__(self, states: DeltaStates, batch: Batch, slots: torch.Tensor) -> None:
        self._states = states
        self._slots = slots
        counts = np.asarray(batch.query_lens)
        begins = counts == np.asarray(batch.context_lens_list)

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(slots.device, non_blocking=True)

        self._begins = tensor(begins)
        self._plan_windows(counts, tensor)
        ends = np.cumsum(counts)
        single = np.flatnonzero(counts == 1)
        self._single_rows, self._single_slots = tensor(ends[single] - 1), slots[tensor(single)]
        self._single_begins = tensor(begins[single])
        self._plan_chunks(counts, ends, begins, tensor)

    def _plan_windows(self, counts: np.ndarray, tensor: Any) -> None:
        """Each request's tokens lie behind its window of earlier inputs: no convolution reaches a neighbour's."""
        width = self._states.shape.kernel_size - 1
        requests = np.arange(len(counts))
        ends = np.cumsum(counts) + (requests + 1) * width
        starts = ends - counts - width
        self._num_columns = int(ends[-1])
        self._token_columns = tensor(np.arange(counts.sum()) + np.repeat((requests + 1) * width, counts))
        self._old_columns = tensor(starts[:, None] + np.arange(width))
        self._new_columns = tensor(ends[:, None] - width + np.arange(width))

    def _plan_chunks(self, counts: np.ndarray, ends: np.ndarray, begins: np.ndarray, tensor: Any) -> None:
        """Rows of each chunk, the first chunks of all requests before the second ones; rows that pad are -1."""
        longest = int(counts.max())
        size = self._chunk_size = min(MAX_CHUNK_TOKENS, longest)
        num_chunks = np.where(counts > 1, -(-counts // size), 0)
        # The longest first: the requests that have an n-th chunk are then the first so many of all.
        order = np.argsort(-num_chunks, kind="stable")[: np.count_nonzero(num_chunks)]
        self._level_sizes = [int((num_chunks > level).sum()) for level in range(num_chunks.max(initial=0))]
        rows = [
            first + np.where(first + np.arange(size) < ends[order[:alive]][:, None], np.arange(size), -1 - first)
            for level, alive in enumerate(self._level_sizes)
            for first in [(ends - counts)[order[:alive]][:, None] + level * size]
        ]
        self._chunk_rows = tensor(np.concatenate(rows) if rows else np.zeros((0, size), np.int64))
        self._is_row = self._chunk_rows >= 0
        self._chunk_slots, self._chunk_begins = self._slots[tensor(order)], tensor(begins[order])
        # The place of each row among the chunks' rows, for those that are in a chunk at all.
        flat = np.concatenate(rows).ravel() if rows else np.zeros(0, np.int64)
        places = np.flatnonzero(flat >= 0)
        self._places, self._place_rows = tensor(places), tensor(flat[places])

    def convolve(self, layer: int, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Causal depthwise convolution of (N, num_channels) by ``weight`` (num_channels, 1, kernel_size), per request.

        Leaves the last inputs of each request in its window. A chunk shorter than the window keeps some of the old ones.
        """
        windows = self._states.windows[layer]
        columns = inputs.new_empty(self._num_columns, inputs.shape[1])
        columns[self._token_columns] = inputs
        columns[self._old_columns] = windows[self._slots].masked_fill(self._begins[:, None, None], 0)
        windows[self._slots] = columns[self._new_columns]
        # Sums of shifted rows, oldest first: on a CPU several times faster than conv1d, which wants channels first.
        taps = weight[:, 0].T
        num_places = self._num_columns - len(taps) + 1
        output = columns[:num_places] * taps[0]
        for shift, tap in enumerate(taps[1:], start=1):
            output.addcmul_(columns[shift : shift + num_places], tap)
        return output[self._token_columns - windows.shape[1]]

    def update(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        log_decay: torch.Tensor,
        rate: torch.Tensor,
    ) -> torch.Tensor:
        """Outputs (N, num_value_heads, value_dim) in fp32 of the gated delta rule, per request.

        ``query`` and ``key`` are (N, num_value_heads, key_dim), normalised and scaled, ``value`` is (N, num_value_heads,
        value_dim), ``log_decay`` and ``rate`` are (N, num_value_heads); all fp32. Leaves each request's state in its slot.
        """
        matrices = self._states.matrices[layer]
        output = torch.empty_like(value)
        if len(self._single_rows):
            rows = self._single_rows
            output[rows] = self._step(matrices, *(each[rows] for each in (query, key, value, log_decay, rate)))
        if self._level_sizes:
            state = matrices[self._chunk_slots].masked_fill_(self._chunk_begins[:, None, None, None], 0)
            chunks = [self._cut(each) for each in (query, key, value, log_decay, rate)]
            result = delta_rule_chunks(state, self._level_sizes, *chunks)
            output[self._place_rows] = result.transpose(1, 2).flatten(0, 1)[self._places]
            matrices[self._chunk_slots] = state
        return output

    def _step(self, matrices: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """The recurrent step of the requests with one token, whose states are among ``matrices``."""
        if matrices.device.type == "cpu":
            # In place, one after the other: a state fits a core's cache, the states of many requests do not.
            for slot, begins in zip(self._single_slots.tolist(), self._single_begins.tolist(), strict=True):
                if begins:
                    matrices[slot].zero_()
            steps = (
                delta_rule_step(matrices[slot : slot + 1], *(each[index : index + 1] for each in inputs))
                for index, slot in enumerate(self._single_slots.tolist())
            )
            return torch.cat(list(steps))
        state = matrices[self._single_slots].masked_fill_(self._single_begins[:, None, None, None], 0)
        output = delta_rule_step(state, *inputs)
        matrices[self._single_slots] = state
        return output

    def _cut(self, values: torch.Tensor) -> torch.Tensor:
        """(N, heads, ...) to (num_chunks, heads, chunk_size, ...), 0 where a chunk is padded."""
        chunks = values[self._chunk_rows.clamp(min=0)]
        return chunks.masked_fill_(~self._is_row.view(*self._is_row.shape, *[1] * (values.ndim - 1)), 0).transpose(1, 2)


def delta_rule_step(
    state: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
) -> torch.Tensor:
    """One token for each of D requests; ``state`` (D, heads, key_dim, value_dim) is updated in place.

    The state is a linear map from keys to values. It decays, then what it answers to ``key`` moves towards ``value`` by the
    share ``rate``: S = exp(log_decay) S; S = S + key^T (rate (value - key S)). The output is query S, (D, heads, value_dim).
    """
    maps = state.mul_(log_decay.exp()[..., None, None]).flatten(0, 1)
    query, key, value = (each.flatten(0, 1).unsqueeze(1) for each in (query, key, value))
    correction = (value - torch.bmm(key, maps)) * rate.view(-1, 1, 1)
    maps.baddbmm_(key.transpose(1, 2), correction)
    return torch.bmm(query, maps).view(*state.shape[:2], -1)


def delta_rule_chunks(
    state: torch.Tensor,
    level_sizes: list[int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_decay: torch.Tensor,
    rate: torch.Tensor,
) -> torch.Tensor:
    """The rule of :func:`delta_rule_step` for chunks of tokens; ``state`` (requests, heads, key_dim, value_dim) in place.

    The other tensors are (chunks, heads, chunk_size, ...). Chunk n of the first ``level_sizes[n]`` requests lies behind
    the chunks before it; keys, values, log decays and rates of 0 pad a chunk and change nothing. Returns (chunks, heads,
    chunk_size, value_dim).

    With c the running sum of log decays in a chunk and D = exp(c_i - c_j) for j <= i, the corrections V' that the tokens of
    a chunk write solve (I + strictly lower part of (rate K K^T D)) V' = rate (V - exp(c) K S), S being the state before.
    """
    size = query.shape[2]
    total = log_decay.cumsum(-1)
    upper = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    # Masked before the exponential: above the diagonal it may overflow, and infinity times 0 is not a number.
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(upper, -torch.inf).exp_()
    rated_key = key * rate.unsqueeze(-1)
    decayed = total.exp().unsqueeze(-1)
    system = (rated_key @ key.transpose(-1, -2)).mul_(decay)
    both = torch.cat([value * rate.unsqueeze(-1), rated_key * decayed], dim=-1)
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    written, read = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    inside = (query @ key.transpose(-1, -2)).mul_(decay)
    query = query * decayed
    key = (key * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    kept = total[..., -1].exp()[..., None, None]
    output = torch.empty_like(value)
    start = 0
    for alive in level_sizes:
        level, start = slice(start, start + alive), start + alive
        before = state[:alive]
        corrections = written[level] - read[level] @ before
        output[level] = query[level] @ before + inside[level] @ corrections
        state[:alive] = before * kept[level] + key[level] @ corrections
    return output


class PackedGatedDeltaNet(torch.nn.Module):
    """Stands in for a Transformers ``Qwen3_5[Moe]GatedDeltaNet`` or ``Qwen3NextGatedDeltaNet``, whose modules it uses.

    ``index`` is the layer's place among the gated DeltaNet layers.
    """

    def __init__(self, layer: Any, index: int) -> None:
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, hidden_states: torch.Tensor, delta_step: DeltaStep | None = None, **options: Any) -> torch.Tensor:
        """(1, N, hidden_size) in and out.

        Raises ValueError when called outside of a packed forward pass, or with a mask or cache of Transformers, because a
        result without them would be silently wrong.
        """
        if delta_step is None:
            raise ValueError("a packed gated DeltaNet layer needs the keyword argument delta_step")
        if any(options.get(name) is not None for name in ("attention_mask", "cache_params")):
            raise ValueError("a packed gated DeltaNet layer takes no mask and no cache: its states are in delta_step")
        layer = self.layer
        mixed, gate, rate, step_size = self._project(hidden_states)
        mixed = ACT2FN[layer.activation](delta_step.convolve(self.index, mixed, layer.conv1d.weight))
        query, key, value = (
            part.unflatten(-1, (-1, size))
            for part, size in zip(
                mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1),
                (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim),
                strict=True,
            )
        )
        # In fp32, or A might overflow in a 16-bit model.
        log_decay = -layer.A_log.float().exp() * F.softplus(step_size.float() + layer.dt_bias)
        group = layer.num_v_heads // layer.num_k_heads
        output = delta_step.update(
            self.index,
            (_normalize(query) * layer.head_k_dim**-0.5).repeat_interleave(group, dim=1),
            _normalize(key).repeat_interleave(group, dim=1),
            value.float(),
            log_decay,
            rate.sigmoid().float(),
        )
        normed = layer.norm(output.to(hidden_states.dtype).flatten(0, 1), gate.reshape(-1, layer.head_v_dim))
        return layer.out_proj(normed.view(1, hidden_states.shape[1], -1))

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Convolution inputs (N, num_channels), output gate (N, value_dim), rate and step size (N, num_value_heads)."""
        layer, rows = self.layer, hidden_states[0]
        return layer.in_proj_qkv(rows), layer.in_proj_z(rows), layer.in_proj_b(rows), layer.in_proj_a(rows)


class PackedQwen3NextGatedDeltaNet(PackedGatedDeltaNet):
    """The same with the two wide projections of Qwen3-Next, which are grouped by key head."""

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = self.layer
        query, key, value, gate, rate, step_size = (
            part[0].flatten(1)
            for part in layer.fix_query_key_value_ordering(
                layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states)
            )
        )
        return torch.cat([query, key, value], dim=-1), gate, rate, step_size


def _normalize(values: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1 in fp32 (nearly: the sum of squares gets an epsilon, as in the models' training)."""
    values = values.float()
    return values * torch.rsqrt(values.square().sum(-1, keepdim=True) + _NORM_EPSILON)
