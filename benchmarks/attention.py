"""Sizes of a model in, milliseconds of attention on CPU out, ours beside PyTorch's; knows no weights and no requests.

    python benchmarks/attention.py --threads 2
    python benchmarks/attention.py --table

``decode`` runs whole decode steps of a Qwen3-0.6B-shaped decoder: in every layer the linear layers of real size, then
attention over a cache of its own, as a model does, so that caches are cold and the threads have just done something else.
Only attention is timed. Ways to attend:

- ``in place``: our kernels read pages through the block table, on PyTorch's own threads (what the engine uses);
- ``in place, own threads``: the same kernels on a second pool of plain threads;
- ``contiguous``: K and V of each request lie in one piece, no pages at all, ``scaled_dot_product_attention`` with the query
  heads of a K and V head folded into the query length: what a server without paging would do;
- ``gather``: pages are copied together for each request, then ``scaled_dot_product_attention``.

``chunk`` times prefill chunks of one request, in place against gathering with our compiled copy; where gathering wins is
what ``MIN_GATHER_ROWS`` says. Rounds are interleaved, so that a slow spell of the machine falls on all; medians are
reported. The ``read`` bandwidth is the best of ten sums over half a gibibyte.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from filmstrip.models import cpu_attention, cpu_threads
from filmstrip.models.batch import Batch
from filmstrip.models.cpu_attention import CpuPagedAttention
from filmstrip.models.cpu_features import num_usable_cores
from filmstrip.models.paged_attention import AttentionShape

RESULTS = Path(__file__).parent / "results" / "attention.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HIDDEN_SIZE, INTERMEDIATE_SIZE = 1024, 3072
SHAPE = AttentionShape(num_layers=28, num_query_heads=16, num_kv_heads=8, head_dim=128)
SCALING = SHAPE.head_dim**-0.5
READ_BYTES = 2**29

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Any]


def make_batch(num_requests: int, num_rows: int, length: int, block_size: int) -> Batch:
    """Requests of ``length`` tokens of which the last ``num_rows`` are queries; their blocks lie in no order."""
    num_blocks = -(-length // block_size)
    tables = torch.randperm(num_requests * num_blocks, generator=torch.Generator().manual_seed(0))
    tables = tables.reshape(num_requests, num_blocks).int()
    positions = torch.arange(length - num_rows, length)
    slots = tables[:, positions // block_size].long() * block_size + positions % block_size
    num_tokens = num_requests * num_rows
    return Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=positions.repeat(num_requests).expand(3, -1),
        slot_mapping=slots.flatten(),
        cu_seqlens_q=torch.arange(0, num_tokens + 1, num_rows, dtype=torch.int32),
        context_lens=torch.full((num_requests,), length, dtype=torch.int32),
        block_tables=tables,
        logits_indices=torch.arange(num_rows - 1, num_tokens, num_rows),
        query_lens=[num_rows] * num_requests,
        context_lens_list=[length] * num_requests,
    )


def make_backend(dtype: torch.dtype, num_layers: int, batch: Batch) -> CpuPagedAttention:
    """A backend whose pages hold random numbers."""
    shape = AttentionShape(num_layers, SHAPE.num_query_heads, SHAPE.num_kv_heads, SHAPE.head_dim)
    backend = CpuPagedAttention(shape, dtype)
    backend.allocate(batch.block_tables.numel())
    for pages in backend.pages:
        for tensor in pages:
            tensor.normal_()
    return backend


class DecodeStep:
    """One decode step with attention in several ways over the same memory."""

    def __init__(self, dtype: torch.dtype, num_layers: int, num_requests: int, length: int) -> None:
        self.num_requests, self.length, self.num_layers = num_requests, length, num_layers
        self.batch = make_batch(num_requests, 1, length, cpu_attention.DEFAULT_BLOCK_SIZE)
        self.backend = make_backend(dtype, num_layers, self.batch)
        self.hidden = torch.randn(num_requests, HIDDEN_SIZE).to(dtype)
        self.layers = [make_linears(dtype) for _ in range(num_layers)]
        self.ways: dict[str, Callable[[], Attend]] = {
            "in place": self._in_place,
            "in place, own threads": self._in_place_on_own_threads,
            "contiguous": lambda: self._contiguous,
            "gather": lambda: self._gather,
        }

    def run(self, way: str) -> dict[str, float]:
        """Milliseconds of a step: ``attention``, per layer, and ``step``, the whole."""
        started = time.perf_counter()
        attend, hidden, attention_seconds = self.ways[way](), self.hidden, 0.0
        for index, (qkv, out, up, down) in enumerate(self.layers):
            query, key, value = F.linear(hidden, qkv).unflatten(1, (-1, SHAPE.head_dim)).split((16, 8, 8), dim=1)
            before = time.perf_counter()
            output = attend(index, query, key, value)
            attention_seconds += time.perf_counter() - before
            hidden = hidden + F.linear(output.reshape(self.num_requests, -1), out)
            gate, wide = F.linear(hidden, up).chunk(2, dim=1)
            hidden = F.layer_norm(hidden + F.linear(F.silu(gate) * wide, down), (HIDDEN_SIZE,))
        step_seconds = time.perf_counter() - started
        return {"attention": attention_seconds / self.num_layers * 1e3, "step": step_seconds * 1e3}

    def _in_place(self) -> Attend:
        step = self.backend.begin(self.batch)
        return lambda index, query, key, value: step.attend(index, query, key, value, SCALING)

    def _in_place_on_own_threads(self) -> Attend:
        attend = self._in_place()

        def on_own_threads(index: int, *qkv: torch.Tensor) -> torch.Tensor:
            with mock.patch.object(cpu_threads, "openmp_parallel", return_value=None):
                return attend(index, *qkv)

        return on_own_threads

    def _contiguous(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        shape = (self.num_requests, SHAPE.num_kv_heads, -1, SHAPE.head_dim)
        keys, values = (pages.view(shape) for pages in self.backend.pages[index])
        keys[:, :, -1], values[:, :, -1] = key, value
        return F.scaled_dot_product_attention(query.reshape(shape), keys, values, scale=SCALING)

    def _gather(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key_pages, value_pages = self.backend.pages[index]
        outputs = []
        for request, blocks in enumerate(self.batch.block_tables.long()):
            keys = key_pages[blocks].permute(1, 0, 3, 2).flatten(1, 2)
            values = value_pages[blocks].transpose(0, 1).flatten(1, 2)
            keys[:, -1], values[:, -1] = key[request], value[request]
            rows = query[request].unflatten(0, (SHAPE.num_kv_heads, -1))
            outputs.append(F.scaled_dot_product_attention(rows[None], keys[None], values[None], scale=SCALING))
        return torch.cat(outputs)


def make_linears(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Weights of one layer: Q, K and V; attention's output; gate and up; down."""
    attention_size = SHAPE.num_query_heads * SHAPE.head_dim
    qkv_size = attention_size + 2 * SHAPE.num_kv_heads * SHAPE.head_dim
    sizes = (
        (qkv_size, HIDDEN_SIZE),
        (HIDDEN_SIZE, attention_size),
        (2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        (HIDDEN_SIZE, INTERMEDIATE_SIZE),
    )
    return tuple((torch.randn(size) / size[1] ** 0.5).to(dtype) for size in sizes)


def measure_decode(dtype_name: str, num_layers: int, num_requests: int, length: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of attention per layer for each way, and the share of the read bandwidth."""
    dtype = DTYPES[dtype_name]
    step = DecodeStep(dtype, num_layers, num_requests, length)
    samples = interleaved({way: (lambda way=way: step.run(way)) for way in step.ways}, repeats)
    num_bytes = 2 * num_requests * length * SHAPE.num_kv_heads * SHAPE.head_dim * dtype.itemsize
    ways = {}
    for way, runs in samples.items():
        attention = statistics.median(run["attention"] for run in runs)
        ways[way] = {
            "attention_ms": round(attention, 4),
            "attention_ms_all": [round(run["attention"], 4) for run in runs],
            "gb_per_second": round(num_bytes / attention / 1e6, 2),
            "step_ms": round(statistics.median(run["step"] for run in runs), 2),
        }
    return {"dtype": dtype_name, "num_requests": num_requests, "length": length, "num_layers": num_layers, "ways": ways}


def measure_chunk(dtype_name: str, num_rows: int, length: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of one layer's attention for a prefill chunk, in place and gathered."""
    dtype = DTYPES[dtype_name]
    batch = make_batch(1, num_rows, length, cpu_attention.DEFAULT_BLOCK_SIZE)
    backend = make_backend(dtype, 1, batch)
    query, key, value = (torch.randn(num_rows, heads, SHAPE.head_dim).to(dtype) for heads in (16, 8, 8))
    steps = {}
    for way, gathers in (("in place", False), ("gather", True)):
        backend.gathers_long_chunks = gathers
        with mock.patch.object(cpu_attention, "MIN_GATHER_ROWS", 1):
            steps[way] = backend.begin(batch)

    def run(way: str) -> float:
        started = time.perf_counter()
        steps[way].attend(0, query, key, value, SCALING)
        return (time.perf_counter() - started) * 1e3

    samples = interleaved({way: (lambda way=way: run(way)) for way in steps}, repeats)
    ways = {way: {"attention_ms": round(statistics.median(runs), 4)} for way, runs in samples.items()}
    return {"dtype": dtype_name, "num_rows": num_rows, "length": length, "ways": ways}


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """``repeats`` results of each, round by round, after a round to warm up."""
    samples: dict[str, list[Any]] = {name: [] for name in runs}
    for round_index in range(repeats + 1):
        for name, run in runs.items():
            result = run()
            if round_index:
                samples[name].append(result)
    return samples


def read_bandwidth() -> float:
    """GB/s of summing up memory."""
    numbers = torch.ones(READ_BYTES // 4)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, READ_BYTES / (time.perf_counter() - started) / 1e9)
    return round(best, 2)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "cores_used": num_usable_cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numba", "llvmlite", "filmstrip")},
    }


def table(results: dict[str, Any]) -> str:
    """The README's table."""
    decode, read = results["decode"], results["read_gb_per_second"]
    ways = list(decode[0]["ways"])
    lines = [
        "| K and V, requests x tokens | " + " | ".join(ways) + " | in place, of read bandwidth |",
        "|---|" + "---|" * (len(ways) + 1),
    ]
    for row in decode:
        cells = [f"{row['ways'][way]['attention_ms']:.2f}" for way in ways]
        share = row["ways"]["in place"]["gb_per_second"] / read
        lines.append(
            f"| {row['dtype']}, {row['num_requests']} x {row['length']} | " + " | ".join(cells) + f" | {share:.0%} |"
        )
    info = results["machine"]
    lines += [
        "",
        "Milliseconds of attention per layer in decode steps (16 query heads, 8 K and V heads of 128, "
        f"{decode[0]['num_layers']} layers between their linear layers), medians of {results['repeats']} interleaved "
        f"rounds; {info['threads']} threads of {info['cpu']}, {read} GB/s read, PyTorch {info['torch']}: "
        f"`{results['command']}`.",
    ]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=num_usable_cores(), help="threads of PyTorch and of the kernels")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--length", type=int, default=1024, help="tokens of each request in decode steps")
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--chunk-rows", nargs="*", type=int, default=[1, 16, 32, 64, 128, 512, 2048])
    parser.add_argument("--chunk-lengths", nargs="*", type=int, default=[1024, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--table", action="store_true", help="print the table of the stored results and measure nothing"
    )
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/attention.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "repeats": arguments.repeats,
        "read_gb_per_second": read_bandwidth(),
        "decode": [],
        "chunk": [],
    }
    print(json.dumps(results["machine"]), f"read {results['read_gb_per_second']} GB/s", flush=True)
    for dtype in arguments.dtypes:
        for num_requests in arguments.requests:
            row = measure_decode(dtype, arguments.layers, num_requests, arguments.length, arguments.repeats)
            results["decode"].append(row)
            print(json.dumps({"decode": {key: value for key, value in row.items() if key != "ways"}}))
            for way, numbers in row["ways"].items():
                short = {key: value for key, value in numbers.items() if key != "attention_ms_all"}
                print(f"  {way:24}{json.dumps(short)}", flush=True)
        for length in arguments.chunk_lengths:
            for num_rows in arguments.chunk_rows:
                if num_rows <= length:
                    results["chunk"].append(measure_chunk(dtype, num_rows, length, arguments.repeats))
                    print(json.dumps({"chunk": results["chunk"][-1]}), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
