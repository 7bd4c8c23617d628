"""Attention backends over pages against plain softmax attention in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from filmstrip.models import cpu_attention, cpu_threads, cuda_attention, dense_attention
from filmstrip.models.batch import Batch
from filmstrip.models.cpu_attention import CpuPagedAttention, plan_runs, plan_works
from filmstrip.models.cuda_attention import CudaPagedAttention, find_varlen_attention, varlen_arguments
from filmstrip.models.dense_attention import attend_all, attend_dense
from filmstrip.models.paged_attention import AttentionShape, PagedAttention, Span
from tests.models.batches import pack, text_request

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CPU = torch.device("cpu")


@dataclass
class Case:
    """Requests with K and V of all their tokens, and the queries of their last ``num_rows`` tokens."""

    batch: Batch
    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def reference_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None = None,
    spans: Sequence[tuple[int, ...]] = (),
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Attention in float64: (n, Hq, D), (L, Hkv, D), (L, Hkv, D) -> (n, Hq, D).

    ``spans`` are (start, end) of tokens, or of several parts one behind the other: (start, end, start, end, ...).
    """
    query, keys, values = (tensor.double() for tensor in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    scores = torch.einsum("nhd,lhd->hnl", query, keys.repeat_interleave(group, 1)) * scaling
    rows, columns = torch.arange(len(keys) - len(query), len(keys))[:, None], torch.arange(len(keys))
    visible = columns <= rows
    for span in spans:
        parts = list(zip(span[::2], span[1::2], strict=True))
        of_rows, of_columns = (sum((start <= x) & (x < end) for start, end in parts) for x in (rows, columns))
        visible |= (of_rows > 0) & (of_columns > 0)
    if window is not None:
        visible &= rows - columns < window
    if chunk_size is not None:
        visible &= rows // chunk_size == columns // chunk_size
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hnl,lhd->nhd", weights, values.repeat_interleave(group, 1))


def run_case(
    attention: PagedAttention,
    lengths: list[tuple[int, int]],
    *,
    seed: int = 0,
    layer: int = 1,
    window: int | None = None,
    spans: Sequence[tuple[int, ...]] = (),
    chunk_size: int | None = None,
) -> float:
    """Largest error of ``attention`` on requests of (rows, tokens): earlier tokens are stored first, then the rows attend.

    ``spans`` are (request, start, end) of tokens that see each other both ways, as far as they are among the rows; with
    gaps (request, start, end, start, end, ...).
    Pages are filled with NaN before: what no token was written to must not be read.
    """
    shape, dtype = attention.shape, attention.dtype
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    counts = [-(-length // attention.block_size) for _, length in lengths]
    blocks = iter(torch.randperm(sum(counts) + 3, generator=generator).tolist())
    attention.allocate(sum(counts) + 3)
    for pages in attention.pages:
        for tensor in pages:
            tensor.fill_(math.nan)
    requests = [
        text_request(range(length), [next(blocks) for _ in range(count)])
        for (_, length), count in zip(lengths, counts, strict=True)
    ]
    keys = [random(length, shape.num_kv_heads, shape.head_dim) for _, length in lengths]
    values = [random(length, shape.num_kv_heads, shape.head_dim) for _, length in lengths]
    queries = [2 * random(rows, shape.num_query_heads, shape.head_dim) for rows, _ in lengths]
    scaling = shape.head_dim**-0.5

    before = [(i, length - rows) for i, (rows, length) in enumerate(lengths) if length > rows]
    if before:
        step = attention.begin(pack([(requests[i], 0, end) for i, end in before], attention.block_size))
        dummies = torch.zeros(sum(end for _, end in before), shape.num_query_heads, shape.head_dim, dtype=dtype)
        step.attend(
            layer,
            dummies,
            torch.cat([keys[i][:end] for i, end in before]),
            torch.cat([values[i][:end] for i, end in before]),
            scaling,
        )
    chunks = [(request, length - rows, length) for request, (rows, length) in zip(requests, lengths, strict=True)]
    step = attention.begin(
        pack(chunks, attention.block_size), [part for span in spans for part in batch_spans(lengths, *span)]
    )
    new_keys, new_values = (
        torch.cat([tensor[len(tensor) - rows :] for tensor, (rows, _) in zip(tensors, lengths, strict=True)])
        for tensors in (keys, values)
    )
    # Transformers hands over transposed views: rows of a head are not contiguous.
    views = [
        tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (torch.cat(queries), new_keys, new_values)
    ]
    output = step.attend(layer, *views, scaling, window, chunk_size)
    assert output.dtype == dtype
    assert output.is_contiguous()
    expected = torch.cat(
        [
            reference_attention(
                *qkv, scaling, window, [tuple(span) for request, *span in spans if request == i], chunk_size
            )
            for i, qkv in enumerate(zip(queries, keys, values, strict=True))
        ]
    )
    assert torch.isfinite(output).all()
    return (output.double() - expected).abs().max().item()


def batch_spans(lengths: list[tuple[int, int]], request: int, *bounds: int) -> list[Span]:
    """The part of a request's span that is in the batch of :func:`run_case`, one for each of its parts."""
    num_rows, length = lengths[request]
    first_token, first_row = length - num_rows, sum(rows for rows, _ in lengths[:request])
    gaps = tuple(zip(bounds[1:-1:2], bounds[2::2], strict=True))
    spans = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        first = max(start, first_token)
        if first < end:
            spans.append(Span(first_row + first - first_token, end - first, bounds[-1], gaps))
    return spans


def cpu_attention_of(dtype=torch.float32, *, heads=(4, 2), head_dim=32, block_size=None) -> CpuPagedAttention:
    """A backend of two layers."""
    return CpuPagedAttention(AttentionShape(2, heads[0], heads[1], head_dim), dtype, block_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 8, 16, 20, 32, 48, 64, 128, 256])
def test_cpu_block_sizes(dtype, block_size):
    lengths = [(1, 1), (1, 700), (5, 33), (40, 40), (3, 128), (1, block_size), (2, block_size + 1)]
    assert run_case(cpu_attention_of(dtype, block_size=block_size), lengths) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (6, 2), (10, 2), (7, 1), (16, 1), (24, 3)])
def test_cpu_grouped_heads(dtype, heads):
    assert run_case(cpu_attention_of(dtype, heads=heads), [(1, 300), (17, 90), (1, 5)]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 72, 80, 96, 128, 256])
def test_cpu_head_sizes(dtype, head_dim):
    assert run_case(cpu_attention_of(dtype, head_dim=head_dim), [(1, 130), (9, 70)]) < TOLERANCE[dtype]


def test_cpu_every_length_to_700():
    attention = cpu_attention_of()
    for start in range(1, 701, 70):
        lengths = [(1 + length % 3 if length > 3 else 1, length) for length in range(start, start + 70)]
        assert run_case(attention, lengths, seed=start) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_cpu_long_contexts_are_split_among_threads(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert run_case(cpu_attention_of(heads=(2, 1)), [(1, 3000), (2, 1501), (1, 7)]) < TOLERANCE[torch.float32]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 5, 32, 33, 100, 1000])
@pytest.mark.parametrize("block_size", [1, 16, 20, 32])
def test_cpu_windows(dtype, window, block_size):
    lengths = [(1, 1), (1, 700), (5, 33), (40, 40), (3, 128), (90, 200), (1, 101)]
    assert run_case(cpu_attention_of(dtype, block_size=block_size), lengths, window=window) < TOLERANCE[dtype]


CHUNK_LENGTHS = [(1, 1), (1, 700), (5, 33), (40, 40), (3, 128), (90, 200), (1, 101), (1, 65), (300, 300)]
"""Rows inside a chunk, over the ends of some, on a chunk's first token."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 5, 32, 33, 64, 100, 1000])
@pytest.mark.parametrize("block_size", [1, 16, 20, 32])
def test_cpu_chunks(dtype, chunk_size, block_size):
    attention = cpu_attention_of(dtype, block_size=block_size)
    assert run_case(attention, CHUNK_LENGTHS, chunk_size=chunk_size) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_cpu_chunks_that_are_split_among_threads(num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        lengths = [(1, 3000), (60, 2010), (1, 7)]
        assert run_case(cpu_attention_of(heads=(2, 1)), lengths, chunk_size=1000) < TOLERANCE[torch.float32]
    finally:
        torch.set_num_threads(before)


def test_cpu_chunks_of_long_bf16_chunks(monkeypatch):
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16_units", lambda: True)
    attention = cpu_attention_of(torch.bfloat16, heads=(6, 2), head_dim=64)
    lengths = [(600, 700), (1, 50), (130, 130)]
    assert run_case(attention, lengths, chunk_size=130) < TOLERANCE[torch.bfloat16]


def test_chunks_and_spans_together_are_refused():
    with pytest.raises(ValueError, match="do not go together"):
        run_case(cpu_attention_of(), SPAN_LENGTHS, spans=SPANS, chunk_size=64)


SPANS = [(0, 3, 30), (1, 70, 100), (1, 100, 131), (2, 0, 90), (3, 150, 200)]
"""One inside a chunk, two that meet, a whole prompt, one that the chunk begins in the middle of."""
SPAN_LENGTHS = [(40, 40), (80, 140), (90, 90), (30, 210), (1, 60)]
SPANS_WITH_GAPS = [
    (0, 3, 9, 11, 30),
    (1, 20, 61, 70, 90, 100, 131),
    (2, 0, 10, 11, 12, 50, 90),
    (3, 150, 190, 192, 200),
]
"""One inside a chunk, one that begins before its chunk, one from end to end, one that the chunk begins in the middle of."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8, 64])
@pytest.mark.parametrize("block_size", [8, 20, 32])
@pytest.mark.parametrize("spans", [SPANS, SPANS_WITH_GAPS])
def test_cpu_spans(dtype, window, block_size, spans):
    attention = cpu_attention_of(dtype, block_size=block_size)
    assert run_case(attention, SPAN_LENGTHS, window=window, spans=spans) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 40])
def test_cpu_windows_and_spans_of_long_bf16_chunks(monkeypatch, window):
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16_units", lambda: True)
    lengths, spans = [(600, 700), (1, 50), (130, 130)], [(0, 300, 420), (2, 0, 129)]
    for shown in (spans, []):
        attention = cpu_attention_of(torch.bfloat16, heads=(6, 2), head_dim=64)
        assert run_case(attention, lengths, window=window, spans=shown) < TOLERANCE[torch.bfloat16]


def test_cpu_layers_of_different_windows_share_a_step():
    attention = cpu_attention_of(heads=(2, 1))
    attention.allocate(10)
    step = attention.begin(pack([(text_request(range(300), list(range(10))), 0, 300)], 32))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(300, heads, 32, generator=generator) for heads in (2, 1, 1))
    for layer, window, chunk_size in ((0, 7, None), (1, None, None), (0, 50, None), (1, None, 50), (1, 7, None)):
        output = step.attend(layer, query, key, value, 0.2, window, chunk_size)
        expected = reference_attention(query, key, value, 0.2, window, chunk_size=chunk_size)
        assert (output.double() - expected).abs().max() < TOLERANCE[torch.float32]


def test_cpu_steps_can_be_repeated():
    """Counters and pending splits are left as they were found."""
    attention = cpu_attention_of(heads=(2, 1))
    attention.allocate(63)
    for pages in attention.pages:
        for seed, tensor in enumerate(pages):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)))
    request = text_request(range(2000), list(range(63)))
    step = attention.begin(pack([(request, 1999, 2000)], 32))
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 32, generator=generator) for heads in (2, 1, 1))
    outputs = [step.attend(layer, query, key, value, 0.2) for layer in (1, 1, 1)]
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_extreme_scores(dtype):
    """The running maximum grows by thousands; weights underflow to 0, never to NaN (the error is that of the scores)."""
    attention = cpu_attention_of(dtype, heads=(2, 1))
    attention.allocate(10)
    request = text_request(range(300), list(range(10)))
    step = attention.begin(pack([(request, 0, 300)], 32))
    generator = torch.Generator().manual_seed(0)
    key = (torch.randn(300, 1, 32, generator=generator) * torch.linspace(0, 60, 300)[:, None, None]).to(dtype)
    value = torch.randn(300, 1, 32, generator=generator).to(dtype)
    query = (20 * torch.randn(300, 2, 32, generator=generator)).to(dtype)
    output = step.attend(0, query, key, value, 1.0)
    expected = reference_attention(query, key, value, 1.0)
    assert (output.double() - expected).abs().max() < (1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("lengths", [[(128, 128)], [(150, 300), (1, 50), (130, 130), (127, 200)], [(700, 701)]])
def test_cpu_long_bf16_chunks_gather_their_pages(monkeypatch, lengths):
    """Where the CPU has bf16 units, long chunks go another way; short ones in the same batch do not."""
    calls = []
    dense = cpu_attention.attend_dense
    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16_units", lambda: True)
    monkeypatch.setattr(cpu_attention, "attend_dense", lambda *args: calls.append(len(args[0])) or dense(*args))
    attention = cpu_attention_of(torch.bfloat16, heads=(6, 2), head_dim=64)
    assert run_case(attention, lengths) < TOLERANCE[torch.bfloat16]
    long = [rows for rows, _ in lengths if rows >= cpu_attention.MIN_GATHER_ROWS]
    assert calls[-len(long) :] == long

    monkeypatch.setattr(cpu_attention, "cpu_has_bfloat16_units", lambda: False)
    calls.clear()
    assert run_case(cpu_attention_of(torch.bfloat16, heads=(6, 2), head_dim=64), lengths) < TOLERANCE[torch.bfloat16]
    assert not calls


def test_cpu_stores_bf16_below_an_fp32_model():
    """Storage may be narrower than arithmetic: queries stay fp32, the error is that of rounding K and V."""
    attention = cpu_attention_of(torch.bfloat16, heads=(2, 1))
    attention.allocate(4)
    step = attention.begin(pack([(text_request(range(50), [3, 1]), 0, 50)], 32))
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(50, heads, 32, generator=generator) for heads in (2, 1, 1))
    output = step.attend(0, query, key, value, 0.2)
    assert output.dtype == torch.float32
    expected = reference_attention(query, key.bfloat16(), value.bfloat16(), 0.2)
    assert (output.double() - expected).abs().max() < TOLERANCE[torch.float32]


def test_cpu_refuses_other_storage():
    with pytest.raises(ValueError, match=r"stored as float32 or bfloat16, not torch\.float16"):
        cpu_attention_of(torch.float16)


def test_cpu_threads_without_openmp(monkeypatch):
    """Plain threads do the same where PyTorch's OpenMP library cannot be called."""
    calls = []
    monkeypatch.setattr(cpu_threads, "openmp_parallel", lambda: calls.append(1))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert run_case(cpu_attention_of(heads=(2, 1)), [(1, 1000), (7, 30)]) < TOLERANCE[torch.float32]
    finally:
        torch.set_num_threads(before)
    assert calls


def test_openmp_library_of_pytorch_comes_first(tmp_path):
    maps = tmp_path / "maps"
    home = torch.__file__.rsplit("/", 1)[0]
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1  /usr/lib/libgomp.so.1.0.0\n"
        f"7f02-7f03 r-xp 00000000 08:01 2  {home}/lib/libgomp-24e2ab19.so.1.0.0\n"
        f"7f04-7f05 r-xp 00000000 08:01 2  {home}/lib/libtorch_cpu.so\n"
        "7f06-7f07 rw-p 00000000 00:00 0\n"
    )
    assert cpu_threads.loaded_openmp_libraries(maps) == [
        f"{home}/lib/libgomp-24e2ab19.so.1.0.0",
        "/usr/lib/libgomp.so.1.0.0",
    ]
    assert cpu_threads.loaded_openmp_libraries(tmp_path / "none") == []


def test_works_cover_every_row_and_token_once():
    query_lens, first_rows, context_lens = [1, 70, 0, 5], [0, 1, 71, 71], [900, 70, 33, 2000]
    ends = np.concatenate([np.arange(end - n, end) + 1 for n, end in zip(query_lens, context_lens, strict=True)])
    starts = np.maximum(0, ends - 1500)
    works, num_partials = plan_works(
        query_lens, first_rows, starts, ends, num_kv_heads=2, max_rows=32, block_size=32, num_threads=2
    )
    seen = {row: set() for row in range(76)}
    for work in works:
        assert work["start"] % 32 == 0
        assert 0 <= work["split"] < work["num_splits"]
        for row in range(work["first_row"], work["first_row"] + work["num_rows"]):
            tokens = set(range(work["start"], work["end"]))
            assert not tokens & seen[row]
            seen[row] |= tokens
            assert work["sequence"] == (0 if row < 1 else 1 if row < 71 else 3)
    for row, tokens in seen.items():
        assert set(range(starts[row], ends[row])) <= tokens
        assert len(tokens) < ends[row] - starts[row] + 32 + 32  # rows of a tile, and the start of a page
    partials = [work["partial"] + work["split"] for work in works if work["num_splits"] > 1]
    assert sorted(partials) == list(range(num_partials))
    assert num_partials > 0


def test_runs_end_at_blocks_and_gaps():
    slots = np.array([5, 6, 7, 8, 9, 30, 31, 16, 3])
    runs = [tuple(run) for run in plan_runs(slots, 8)]
    assert runs == [(0, 3, 0, 5), (3, 2, 1, 0), (5, 2, 3, 6), (7, 1, 2, 0), (8, 1, 0, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 90), (90, 90), (7, 90), (89, 90), (40, 300)])
def test_dense_attention(dtype, rows, length):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, 6, 32, generator=generator).to(dtype)
    keys, values = (torch.randn(2, length, 32, generator=generator).to(dtype) for _ in range(2))
    expected = reference_attention(query, keys.transpose(0, 1), values.transpose(0, 1), 0.3)
    output = attend_dense(query, keys, values, 0.3)
    assert (output.double() - expected).abs().max() < TOLERANCE[dtype]


def test_dense_attention_with_masks(monkeypatch):
    """The form that devices other than the CPU take, in slabs of a few rows."""
    monkeypatch.setattr(dense_attention, "ROWS_PER_MASK", 16)
    monkeypatch.setattr(dense_attention, "_attend_in_two_parts", dense_attention._attend_with_masks)
    test_dense_attention(torch.float32, 40, 300)
    test_dense_attention(torch.float32, 16, 17)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_gpu_gets_no_heads_that_share_keys(monkeypatch, num_kv_heads):
    """CUDA's memory-efficient kernel takes one row left over for a single query where the heads of an entry do."""
    both = dense_attention.grouped
    seen = []

    def apart(query, keys, values, **_):
        seen.append(both(query, keys, values, apart=True))
        return seen[-1]

    monkeypatch.setattr(dense_attention, "grouped", apart)
    together = dense_attention.ungrouped
    monkeypatch.setattr(dense_attention, "ungrouped", lambda output, **_: together(output, apart=True))
    for rows, length in ((1, 90), (65, 65), (65, 165)):
        test_dense_attention(torch.float32, rows, length)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(65, 6, 32, generator=generator)
    keys, values = (torch.randn(40, num_kv_heads, 32, generator=generator).transpose(0, 1) for _ in range(2))
    scores = torch.einsum("qgcd,gkd->gcqk", query.unflatten(1, (num_kv_heads, -1)).double(), keys.double()) * 0.3
    expected = torch.einsum("gcqk,gkd->qgcd", scores.softmax(-1), values.double()).flatten(1, 2)
    assert (attend_all(query, keys, values, 0.3).double() - expected).abs().max() < 1e-5
    for rows, *shared in seen:
        assert rows.shape[:2] == shared[0].shape[:2] == shared[1].shape[:2]
        assert all(tensor.stride(1) != 0 for tensor in shared)
        assert all(tensor.stride(0) == 0 for tensor in shared)  # no copies either


def fake_varlen_attention(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
):
    """What ``varlen_attn`` documents, computed plainly, with the checks of its CUDA kernel."""
    left, right = window_size  # how many tokens before and behind itself a token sees; -1: all
    assert right == 0
    assert enable_gqa
    for tensor in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert query.is_contiguous()
    assert key.shape[1] % 256 == 0
    num_requests = len(cu_seq_q) - 1
    assert len(cu_seq_k) == num_requests + 1
    assert len(seqused_k) == len(block_table) == num_requests
    lengths = seqused_k.tolist()
    assert max_k == max(lengths)
    assert max_q == int(cu_seq_q.diff().max())
    outputs = []
    for request, length in enumerate(lengths):
        keys, values = (pages[block_table[request].long()].flatten(0, 1)[:length] for pages in (key, value))
        rows = query[cu_seq_q[request] : cu_seq_q[request + 1]]
        window = None if left == -1 else left + 1
        outputs.append(reference_attention(rows, keys, values, scale, window).to(query.dtype))
    return torch.cat(outputs)


def test_cuda_backend_tells_the_kernel_about_the_batch(monkeypatch):
    """The CUDA backend's bookkeeping, run on CPU with the kernel replaced by one that computes plainly."""
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: fake_varlen_attention)
    attention = CudaPagedAttention(AttentionShape(2, 6, 2, 64), torch.bfloat16, CPU)
    assert attention.varlen is fake_varlen_attention
    assert attention.block_size == 256
    for window in (None, 1, 33, 300):
        lengths = [(1, 300), (40, 40), (5, 257), (1, 1)]
        assert run_case(attention, lengths, window=window) < TOLERANCE[torch.bfloat16]
        for spans in (SPANS, SPANS_WITH_GAPS):
            assert run_case(attention, SPAN_LENGTHS, window=window, spans=spans) < TOLERANCE[torch.bfloat16]


def test_cuda_backend_cuts_requests_at_chunks(monkeypatch, caplog):
    """The kernel knows no chunks: it is told of a request for each, where chunks begin with a page."""
    told = []

    def noting(query, *pages, **arguments):
        told.append((arguments["cu_seq_q"].tolist(), arguments["seqused_k"].tolist()))
        return fake_varlen_attention(query, *pages, **arguments)

    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: noting)
    attention = CudaPagedAttention(AttentionShape(2, 6, 2, 64), torch.bfloat16, CPU)
    lengths = [(1, 1100), (40, 520), (300, 300), (1, 513)]
    assert run_case(attention, lengths, chunk_size=512) < TOLERANCE[torch.bfloat16]
    assert told[-1] == ([0, 1, 33, 41, 341, 342], [76, 512, 8, 300, 1])
    num_calls = len(told)
    for _ in range(2):
        assert run_case(attention, lengths, chunk_size=300) < TOLERANCE[torch.bfloat16]
    assert len(told) == num_calls + 2  # to store what came before
    assert caplog.text.count("chunk size 300 is not a multiple of block_size 256") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_backend_gathers_where_it_must(dtype, caplog):
    attention = CudaPagedAttention(AttentionShape(2, 6, 2, 64), dtype, CPU)
    assert attention.varlen is None
    assert attention.block_size == 32
    assert "gathers K and V pages" in caplog.text
    for window in (None, 1, 33, 300):
        assert run_case(attention, [(1, 300), (40, 40), (5, 257), (1, 1)], window=window) < TOLERANCE[dtype]
        for spans in (SPANS, SPANS_WITH_GAPS):
            assert run_case(attention, SPAN_LENGTHS, window=window, spans=spans) < TOLERANCE[dtype]
    assert run_case(attention, CHUNK_LENGTHS, chunk_size=33) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("shape", "dtype", "block_size", "reason"),
    [
        (AttentionShape(1, 4, 2, 64), torch.float32, None, "computes float16 and bfloat16, not torch.float32"),
        (AttentionShape(1, 4, 2, 512), torch.bfloat16, None, "up to 256 in steps of 8, not 512"),
        (AttentionShape(1, 4, 2, 60), torch.bfloat16, None, "up to 256 in steps of 8, not 60"),
        (AttentionShape(1, 4, 2, 64), torch.bfloat16, 32, "block_size 32 is not a multiple of 256"),
    ],
)
def test_cuda_backend_says_why_it_gathers(monkeypatch, caplog, shape, dtype, block_size, reason):
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: fake_varlen_attention)
    assert CudaPagedAttention(shape, dtype, CPU, block_size).varlen is None
    assert reason in caplog.text


def test_cuda_backend_distrusts_a_kernel_that_fails_or_is_wrong(monkeypatch, caplog):
    def refusing(*args, **kwargs):
        raise RuntimeError("paged KV is not supported\nC++ stack")

    shape = AttentionShape(1, 4, 2, 64)
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: refusing)
    assert CudaPagedAttention(shape, torch.bfloat16, CPU).varlen is None
    assert "refuses pages here (paged KV is not supported)" in caplog.text
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: lambda query, *args, **kwargs: query)
    assert CudaPagedAttention(shape, torch.bfloat16, CPU).varlen is None
    assert "is off by" in caplog.text
    monkeypatch.setattr(cuda_attention, "find_varlen_attention", lambda: None)
    assert CudaPagedAttention(shape, torch.bfloat16, CPU).varlen is None
    assert "has no varlen_attn with block tables" in caplog.text


def test_installed_varlen_attention_takes_our_arguments():
    """Skipped where PyTorch is too old; the names and kinds of what we pass are in the signature of the real function."""
    varlen = find_varlen_attention()
    if varlen is None:
        pytest.skip(f"PyTorch {torch.__version__} has no varlen_attn with block tables")
    batch = pack([(text_request(range(300), [1, 0]), 290, 300), (text_request(range(5), [2]), 4, 5)], 256)
    arguments = varlen_arguments(batch)
    assert arguments["cu_seq_q"].tolist() == [0, 10, 11]
    assert arguments["cu_seq_k"].tolist() == [0, 300, 305]
    assert arguments["seqused_k"].tolist() == [300, 5]
    assert arguments["block_table"].tolist() == [[1, 0], [2, 0]]
    pages = torch.zeros(3, 256, 2, 64, dtype=torch.bfloat16, device="meta")
    query = torch.zeros(11, 4, 64, dtype=torch.bfloat16, device="meta")
    on_meta = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    assert varlen(query, pages, pages, scale=0.1, **on_meta).shape == query.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("window", "spans", "chunk_size"),
    [(None, [], None), (100, [], None), (None, [Span(1, 200, 200)], None), (None, [], 256), (None, [], 300)],
)
def test_cuda_attention_on_a_gpu(dtype, window, spans, chunk_size):
    device = torch.device("cuda", 0)
    attention = CudaPagedAttention(AttentionShape(2, 16, 8, 128), dtype, device)
    host = CudaPagedAttention(AttentionShape(2, 16, 8, 128), dtype, CPU, attention.block_size)
    # Of some a single row is left over in tiles of 32 or 64 rows.
    lengths = [(1, 700), (300, 300), (40, 1000), (1, 1), (65, 165), (129, 129), (33, 33)]
    generator = torch.Generator().manual_seed(0)
    counts = [-(-length // attention.block_size) for _, length in lengths]
    blocks = iter(torch.randperm(sum(counts), generator=generator).tolist())
    requests = [
        text_request(range(n), [next(blocks) for _ in range(c)]) for (_, n), c in zip(lengths, counts, strict=True)
    ]
    outputs = []
    for backend in (attention, host):
        backend.allocate(sum(counts))
        for pages in backend.pages:
            for seed, tensor in enumerate(pages):
                random = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
                tensor.copy_(random)
        target = device if backend is attention else CPU
        chunks = [(request, n - rows, n) for request, (rows, n) in zip(requests, lengths, strict=True)]
        batch = pack(chunks, backend.block_size, device=target)
        tensors = torch.Generator().manual_seed(9)
        query, key, value = (
            torch.randn(batch.num_tokens, heads, 128, generator=tensors).to(target, dtype) for heads in (16, 8, 8)
        )
        step = backend.begin(batch, spans)
        outputs.append(step.attend(1, query, key, value, 128**-0.5, window, chunk_size).cpu())
    assert (outputs[0].double() - outputs[1].double()).abs().max() < TOLERANCE[dtype]
