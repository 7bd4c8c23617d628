"""Fixtures that all tests share: tiny checkpoints made on the spot."""

import os

# Several tests run a model in this process: on a small machine more threads than cores only collide.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

from filmstrip.demo.checkpoint import make_qwen3_vl
from tests.families import Outcomes

torch.set_num_threads(2)


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(), "filmstrip-outcomes")


def pytest_collection_modifyitems(items):
    """What looks back at the run comes last."""
    items.sort(key=lambda item: item.path.name == "test_families.py")


@pytest.fixture(scope="session")
def qwen3_vl_dir(tmp_path_factory):
    """A tiny random fp32 Qwen3-VL checkpoint."""
    return str(make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl")))


@pytest.fixture(scope="session")
def qwen3_vl_moe_dir(tmp_path_factory):
    """A tiny random fp32 Qwen3-VL-MoE checkpoint."""
    return str(make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl_moe"), moe=True))
