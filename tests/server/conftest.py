"""A real server on a tiny checkpoint, which the tests of previews and of the page share."""

import pytest

from tests.server.test_end_to_end import Server


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The directory that the server may read media from."""
    return tmp_path_factory.mktemp("previews")


@pytest.fixture(scope="session")
def server(qwen3_vl_dir, folder):
    """Called ``tiny``, with a context of 8192 tokens. Other modules may have one of their own."""
    running = Server(qwen3_vl_dir, folder)
    yield running
    running.close()
