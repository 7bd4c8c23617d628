"""Fixtures that all tests share: tiny checkpoints made on the spot."""

import os

# Several tests run a model in this process: on a small machine more threads than cores only collide.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from filmstrip.demo.checkpoint import make_qwen3_vl

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def qwen3_vl_dir(tmp_path_factory):
    """A tiny random fp32 Qwen3-VL checkpoint."""
    return str(make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl")))


@pytest.fixture(scope="session")
def qwen3_vl_moe_dir(tmp_path_factory):
    """A tiny random fp32 Qwen3-VL-MoE checkpoint."""
    return str(make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl_moe"), moe=True))
