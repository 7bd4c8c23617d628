"""Packed Q, K and V of one step in, attention over pages in GPU memory out; knows no model and no scheduler.

PyTorch's ``varlen_attn`` reads pages through a block table where it is new enough; otherwise, and for fp32, which flash
attention does not compute, the pages of each request are gathered and go through ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from filmstrip.models.batch import Batch
from filmstrip.models.dense_attention import attend_dense
from filmstrip.models.paged_attention import AttentionShape, Span, VisibleTokens

logger = logging.getLogger(__name__)

FLASH_BLOCK_MULTIPLE = 256
"""Flash attention 2 takes pages of a multiple of 256 tokens ("Paged KV cache block size must be divisible by 256" in
``mha_varlen_fwd`` of PyTorch's flash_api.cpp)."""

GATHER_BLOCK_SIZE = 32
"""Tokens per page where pages are gathered: small pages waste less memory, and a copy does not mind."""

MAX_FLASH_HEAD_DIM = 256
"""The widest head that flash attention 2 computes."""

VarlenAttention = Callable[..., torch.Tensor]


class CudaPagedAttention:
    """Pages (num_blocks, block_size, num_kv_heads, head_dim) for each layer, one tensor for K and one for V."""

    def __init__(
        self, shape: AttentionShape, dtype: torch.dtype, device: torch.device, block_size: int | None = None
    ) -> None:
        """Choose the kernel; ``block_size`` None means the one that suits it.

        A ``block_size`` that flash attention cannot read leaves the gather path, which is said in the log.
        """
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.varlen = usable_varlen_attention(shape, dtype, device, block_size)
        self.block_size = block_size or (FLASH_BLOCK_MULTIPLE if self.varlen else GATHER_BLOCK_SIZE)
        self.kv_bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
        self.pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gathered_chunk_sizes: set[int] = set()

    def allocate(self, num_blocks: int) -> None:
        """Make ``num_blocks`` zeroed pages for every layer; pages made before are dropped first."""
        page_shape = (num_blocks, self.block_size, self.shape.num_kv_heads, self.shape.head_dim)
        self.pages = []
        for _ in range(self.shape.num_layers):
            key_pages, value_pages = (torch.zeros(page_shape, dtype=self.dtype, device=self.device) for _ in range(2))
            self.pages.append((key_pages, value_pages))

    def reads_chunks_of(self, chunk_size: int | None) -> bool:
        """Whether chunks of ``chunk_size`` tokens begin with a page; said once in the log if not: pages are gathered."""
        if chunk_size is None or chunk_size % self.block_size == 0:
            return True
        if chunk_size not in self._gathered_chunk_sizes:
            self._gathered_chunk_sizes.add(chunk_size)
            logger.warning(
                "attention in chunks gathers K and V pages for each request, which is slower: the chunk size %d is not a "
                "multiple of block_size %d",
                chunk_size,
                self.block_size,
            )
        return False

    def begin(self, batch: Batch, spans: Sequence[Span] = ()) -> CudaAttentionStep:
        """Prepare the forward pass of ``batch``, whose rows in ``spans`` see each other both ways."""
        return CudaAttentionStep(self, batch, VisibleTokens(batch, spans))


class CudaAttentionStep:
    """One forward pass on a CUDA device. Flash attention has no spans: a step that has some gathers pages.

    Nor has it chunks: there a request goes to the kernel as several, each with the pages of one chunk.
    """

    def __init__(self, attention: CudaPagedAttention, batch: Batch, visible: VisibleTokens) -> None:
        self._attention = attention
        self._batch, self._visible = batch, visible
        self._varlen = None if visible.has_spans else attention.varlen
        self._varlen_arguments: dict[int | None, dict[str, Any]] = {}

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        window: int | None = None,
        chunk_size: int | None = None,
    ) -> torch.Tensor:
        """See :class:`filmstrip.models.paged_attention.AttentionStep`."""
        key_pages, value_pages = self._attention.pages[layer_index]
        key_pages.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, key)
        value_pages.flatten(0, 1).index_copy_(0, self._batch.slot_mapping, value)
        if self._varlen is None or not self._attention.reads_chunks_of(chunk_size):
            pages = (key_pages, value_pages)
            return attend_gathered(self._batch, query, *pages, scaling, self._visible, window, chunk_size)
        arguments = self._arguments(chunk_size)
        if window is not None:
            arguments = arguments | {"window_size": (window - 1, 0)}
        return self._varlen(query.contiguous(), key_pages, value_pages, scale=scaling, **arguments)

    def _arguments(self, chunk_size: int | None) -> dict[str, Any]:
        """What the kernel is told, worked out when the first layer of this ``chunk_size`` asks."""
        if chunk_size not in self._varlen_arguments:
            batch = self._batch
            cut = batch if chunk_size is None else cut_at_chunks(batch, chunk_size, self._attention.block_size)
            self._varlen_arguments[chunk_size] = varlen_arguments(cut)
        return self._varlen_arguments[chunk_size]


def cut_at_chunks(batch: Batch, chunk_size: int, block_size: int) -> Batch:
    """``batch`` with each request cut into one for every chunk of ``chunk_size`` tokens that its rows are in.

    Each has the pages of its own chunk only. ``chunk_size`` is a multiple of ``block_size``.
    """
    pieces = [
        (request, chunk, max(length - num_rows, chunk * chunk_size), min(length, (chunk + 1) * chunk_size))
        for request, (num_rows, length) in enumerate(zip(batch.query_lens, batch.context_lens_list, strict=True))
        for chunk in range((length - num_rows) // chunk_size, (length - 1) // chunk_size + 1)
    ]
    query_lens = [end - start for _, _, start, end in pieces]
    context_lens = [end - chunk * chunk_size for _, chunk, _, end in pieces]
    num_pages = -(-max(context_lens) // block_size)
    table = batch.block_tables
    requests, firsts = (
        torch.tensor(values, device=table.device)
        for values in zip(*((request, chunk * chunk_size // block_size) for request, chunk, *_ in pieces), strict=True)
    )
    # Behind a piece's last page anything may stand: the kernel does not look there.
    columns = (firsts[:, None] + torch.arange(num_pages, device=table.device)).clamp_(max=table.shape[1] - 1)
    rows = torch.tensor(query_lens, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return dataclasses.replace(
        batch,
        cu_seqlens_q=torch.nn.functional.pad(rows, (1, 0)).to(table.device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=table.device),
        block_tables=table[requests[:, None], columns],
        query_lens=query_lens,
        context_lens_list=context_lens,
    )


def varlen_arguments(batch: Batch) -> dict[str, Any]:
    """What ``varlen_attn`` is told about ``batch``: everything but Q, pages and scale.

    A window of (-1, 0) is causal, aligned at the lower right when there are fewer queries than keys, which is what a chunk
    over cached pages needs.
    """
    context_lens = batch.context_lens.to(torch.int32)
    return {
        "cu_seq_q": batch.cu_seqlens_q.to(torch.int32),
        # Flash attention takes both cumulative tensors or none; with a block table it reads seqused_k, not this one.
        "cu_seq_k": torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        "max_q": max(batch.query_lens),
        "max_k": max(batch.context_lens_list),
        "window_size": (-1, 0),
        "enable_gqa": True,
        "seqused_k": context_lens,
        "block_table": batch.block_tables.to(torch.int32),
    }


def attend_gathered(
    batch: Batch,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    scaling: float,
    visible: VisibleTokens,
    window: int | None = None,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """Attention of each request over a contiguous copy of its pages (num_blocks, block_size, num_kv_heads, head_dim)."""
    block_size = key_pages.shape[1]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    start = 0
    for blocks, num_rows, length in zip(batch.block_tables, batch.query_lens, batch.context_lens_list, strict=True):
        used = blocks[: -(-length // block_size)]
        keys, values = (pages[used].flatten(0, 1)[:length].transpose(0, 1) for pages in (key_pages, value_pages))
        rows = slice(start, start + num_rows)
        output[rows] = attend_dense(query[rows], keys, values, scaling, visible.bounds(rows, window, chunk_size))
        start += num_rows
    return output


def usable_varlen_attention(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device, block_size: int | None
) -> VarlenAttention | None:
    """PyTorch's ``varlen_attn`` if it can read our pages on ``device``, else None and a line in the log saying why."""
    varlen, reason = find_varlen_attention(), ""
    if varlen is None:
        reason = f"PyTorch {torch.__version__} has no varlen_attn with block tables"
    elif dtype not in (torch.float16, torch.bfloat16):
        reason = f"flash attention computes float16 and bfloat16, not {dtype}"
    elif shape.head_dim > MAX_FLASH_HEAD_DIM or shape.head_dim % 8:
        reason = f"flash attention takes head sizes up to {MAX_FLASH_HEAD_DIM} in steps of 8, not {shape.head_dim}"
    elif block_size is not None and block_size % FLASH_BLOCK_MULTIPLE:
        reason = f"block_size {block_size} is not a multiple of {FLASH_BLOCK_MULTIPLE}"
    else:
        reason = probe_varlen_attention(varlen, shape, dtype, device)
    if not reason:
        return varlen
    logger.warning("attention gathers K and V pages for each request, which is slower: %s", reason)
    return None


def find_varlen_attention() -> VarlenAttention | None:
    """``torch.nn.attention.varlen.varlen_attn`` if it exists and takes block tables, grouped heads and windows."""
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    needed = {"block_table", "seqused_k", "enable_gqa", "window_size", "scale"}
    return varlen if needed <= set(inspect.signature(varlen).parameters) else None


@torch.inference_mode()
def probe_varlen_attention(
    varlen: VarlenAttention, shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> str:
    """Run ``varlen`` once on two small requests; empty if it answers like the gather path, else what was wrong.

    The signature alone does not tell: the same Python function may run a kernel that refuses pages on this GPU.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    key_pages, value_pages = (random(3, FLASH_BLOCK_MULTIPLE, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    query = random(5, shape.num_query_heads, shape.head_dim)
    batch = Batch(
        token_ids=torch.zeros(5, dtype=torch.int64, device=device),
        positions=torch.zeros(3, 5, dtype=torch.int64, device=device),
        slot_mapping=torch.zeros(5, dtype=torch.int64, device=device),
        cu_seqlens_q=torch.tensor([0, 4, 5], dtype=torch.int32, device=device),
        context_lens=torch.tensor([FLASH_BLOCK_MULTIPLE + 3, 7], dtype=torch.int32, device=device),
        block_tables=torch.tensor([[2, 0], [1, 0]], dtype=torch.int32, device=device),
        logits_indices=torch.tensor([3, 4], device=device),
        query_lens=[4, 1],
        context_lens_list=[FLASH_BLOCK_MULTIPLE + 3, 7],
    )
    scaling = shape.head_dim**-0.5
    try:
        output = varlen(query, key_pages, value_pages, scale=scaling, **varlen_arguments(batch))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return f"varlen_attn refuses pages here ({str(error).splitlines()[0][:200]})"
    pages = (key_pages.float(), value_pages.float())
    expected = attend_gathered(batch, query.float(), *pages, scaling, VisibleTokens(batch))
    difference = (output.float() - expected).abs().max().item()
    return "" if difference < 0.05 else f"varlen_attn is off by {difference:.2g} on a small case"
