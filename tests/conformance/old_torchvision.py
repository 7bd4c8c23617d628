"""What torchvision 0.24 documents of ``torchvision.io.VideoReader`` with its PyAV backend, for tests without that version.

Bytes come in; each frame is {"data": uint8 (3, height, width) as stored, "pts": seconds}. Nothing is turned, nothing sought.
"""

import io
import types

import av
import torch


class VideoReader:
    """Iterates over the frames of the first video stream."""

    def __init__(self, src, stream="video", num_threads=0):
        if not isinstance(src, bytes | str):
            raise ValueError("src must be either string, Tensor or bytes object")
        assert stream == "video"
        self._frames = av.open(io.BytesIO(src), metadata_errors="ignore").decode(video=0)

    def __iter__(self):
        return self

    def __next__(self):
        frame = next(self._frames)
        data = torch.from_numpy(frame.to_rgb().to_ndarray()).permute(2, 0, 1)
        return {"data": data, "pts": float(frame.pts * frame.time_base)}


def modules(version, *, has_reader):
    """``sys.modules`` entries of a torchvision of that version."""
    package, package_io = types.ModuleType("torchvision"), types.ModuleType("torchvision.io")
    package.__version__, package.io = version, package_io
    if has_reader:
        package_io.VideoReader = VideoReader
    return {"torchvision": package, "torchvision.io": package_io}
