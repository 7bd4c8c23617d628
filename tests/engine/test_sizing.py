"""Memory to limits: what was asked for is what there is, or an error says which option to change."""

import dataclasses
import logging

import pytest
import torch

from filmstrip.config import EngineConfig
from filmstrip.engine import memory, sizing
from filmstrip.engine.sizing import GIB, decide_limits
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import ModelInfo

INFO = ModelInfo(
    vocab_size=1000,
    hidden_size=64,
    max_position_embeddings=32768,
    num_embedding_rows=1,
    block_size=16,
    kv_bytes_per_token=65536,  # a block is 1 MiB
    device=torch.device("cpu"),
    dtype=torch.float32,
)


@pytest.fixture(autouse=True)
def free_gigabytes(monkeypatch):
    """10 GiB are free."""
    monkeypatch.setattr(sizing, "free_host_bytes", lambda: 10 * GIB)


def test_defaults_are_the_stated_shares():
    limits = decide_limits(EngineConfig("m"), INFO)
    assert limits.num_blocks == 4096
    assert limits.encoder_cache_bytes == GIB // 2
    assert limits.max_model_len == 32768
    assert limits.max_num_batched_tokens == 512


def test_given_sizes_are_used_in_full():
    limits = decide_limits(
        EngineConfig("m", kv_cache_gb=6, encoder_cache_gb=0.25, max_num_seqs=1, max_model_len=64), INFO
    )
    assert limits.num_blocks == 6 * 1024
    assert limits.encoder_cache_bytes == GIB // 4


def test_media_that_are_attended_to_get_more(caplog):
    info = dataclasses.replace(INFO, cross_attention_bytes_per_segment=GIB)
    assert decide_limits(EngineConfig("m"), info).encoder_cache_bytes == int(0.15 * 10 * GIB)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        decide_limits(EngineConfig("m", encoder_cache_gb=0.5, max_num_seqs=1, max_model_len=64), info)
    assert "0.500 GiB does not hold one picture, which takes 1.000" in caplog.text


def test_a_small_model_does_not_take_what_it_cannot_fill():
    limits = decide_limits(EngineConfig("m", max_num_seqs=2, max_model_len=160), INFO)
    assert limits.num_blocks == 4 * 2 * 10


def test_the_context_is_what_the_cache_holds(caplog):
    with caplog.at_level(logging.WARNING):
        limits = decide_limits(EngineConfig("m", kv_cache_gb=1), INFO)
    assert limits.max_model_len == 16384
    assert "16384 instead of the model's 32768 (--kv-cache-gb)" in caplog.text


@pytest.mark.parametrize(
    ("options", "param", "match"),
    [
        ({"max_model_len": 20000, "kv_cache_gb": 1}, "max_model_len", r"20000 needs 1.22 GiB .* are 1.00: raise --kv"),
        ({"kv_cache_gb": 0.0005}, "kv_cache_gb", "one block of 16 tokens .*raise --kv-cache-gb"),
        (
            {"max_model_len": 40000},
            "max_model_len",
            "at most 32768, the longest that this model was made for, not 40000",
        ),
        ({"max_model_len": 0}, "max_model_len", "at least 2, not 0"),
        ({"max_num_seqs": 0}, "max_num_seqs", "at least 1"),
        ({"max_num_batched_tokens": -5}, "max_num_batched_tokens", "at least 1"),
        ({"encoder_cache_gb": -1}, "encoder_cache_gb", "at least 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization", "at most 1"),
    ],
)
def test_sizes_that_cannot_work(options, param, match):
    with pytest.raises(ModelLoadError, match=match) as caught:
        decide_limits(EngineConfig("m", **options), INFO)
    assert caught.value.param == param


def test_a_gpu_keeps_room_for_a_step(monkeypatch):
    info = dataclasses.replace(INFO, device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    limits = decide_limits(EngineConfig("m", gpu_memory_utilization=0.9), info)
    used = limits.num_blocks * 1024**2 + limits.encoder_cache_bytes
    assert 14 * GIB < used < 16.6 * GIB
    assert limits.max_num_batched_tokens == 2048


def write_group(folder, limit, current, inactive, names):
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, cache_name = names
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {inactive}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("line", "groups", "expected"),
    [
        ("0::/", {"": ("max", 5, 0)}, 1000),
        ("0::/", {"": (600, 300, 100)}, 400),
        ("0::/a/b", {"a/b": ("max", 5, 0), "a": (500, 480, 10)}, 30),
        ("0::/not/mounted", {"": (700, 100, 0)}, 600),
        ("0::/", {"": (5000, 100, 0)}, 1000),
        ("0::/", {"": (500, 900, 0)}, 0),
        ("4:memory:/x", {"memory/x": (400, 100, 50), "memory": (1 << 63, 5, 0)}, 350),
        ("3:cpuset:/x", {"memory/x": (400, 100, 50)}, 1000),
        (None, {"": (1, 1, 0)}, 1000),
    ],
)
def test_a_container_has_less_than_its_machine(tmp_path, monkeypatch, line, groups, expected):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if line is not None:
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"{line}\n")
    for path, (limit, current, inactive) in groups.items():
        names = V1 if "memory" in path else V2
        write_group(tmp_path / "sys" / path, limit, current, inactive, names)
    assert memory.free_host_bytes(tmp_path / "proc", tmp_path / "sys") == expected
