"""One server for all attacks of a test run, with the files it may serve."""

import pytest

from tests.attacks.harness import AttackedServer
from tests.media.numbered import encode


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A good video of 20 frames."""
    path = tmp_path_factory.mktemp("attack-clip") / "clip.mp4"
    arguments = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p", "-g", "10")
    return encode(path, *arguments, num_frames=20).read_bytes()


@pytest.fixture(scope="session")
def media_root(tmp_path_factory, clip):
    """The directory that the server's clients may read from, with one good clip."""
    root = tmp_path_factory.mktemp("attack-root") / "R"
    root.mkdir()
    (root / "clip.mp4").write_bytes(clip)
    return root


@pytest.fixture(scope="package")
def server(qwen3_vl_dir, media_root, clip, tmp_path_factory):
    """The server, its fetcher on a hostile internet, its clients in ``media_root``.

    It ends with the last attack: other tests look at what processes are left.
    """
    with AttackedServer(qwen3_vl_dir, media_root, clip, tmp_path_factory.mktemp("attack-tls")) as server:
        yield server
