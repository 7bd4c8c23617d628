"""Videos through torchvision's VideoReader, from memory, where a version still has it; knows not how frames are checked."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from typing import ClassVar

import numpy as np
from torchvision.io import VideoReader  # type: ignore[import-not-found]

from filmstrip.media.decoders.checked import Check, CheckedReader, DecodedFrame, References, as_array, sample
from filmstrip.media.decoders.pyav import as_displayed


class TorchVisionReader(CheckedReader):
    """All frames from the first to the last that is wanted, each known by the time of its picture.

    Its seeks are not exact, so nothing is skipped. It does not turn pictures as the file says; they are turned here. Times
    count from the first picture that comes out, which is compared with PyAV's first frame. The file is kept in memory.
    """

    name: ClassVar[str] = "torchvision"
    label: ClassVar[str] = "torchvision"

    def frames(
        self, frame_indices: Sequence[int], num_threads: int, references: References, check: Check
    ) -> Generator[DecodedFrame, None, None]:
        """See :meth:`CheckedReader.frames`."""
        with self.source.open() as file:
            data = file.read()
        with self.failing_on("cannot open this video", check), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every version that has it says that it will go
            video = VideoReader(data, "video", num_threads)
        first = next(video)
        zero_seconds = first["pts"]
        references.compare(0, sample(self._displayed(first["data"])))
        times = self.metadata.timestamps
        picture, seconds = first["data"], 0.0
        for index in frame_indices:
            while seconds < times[index] - self.seconds_around(index):
                check()
                following = next(video)
                picture, before, seconds = following["data"], seconds, following["pts"] - zero_seconds
                if not seconds > before:
                    raise self.refuse("does not tell the times of this video's frames")
            yield DecodedFrame(self._displayed(picture), seconds)

    def _displayed(self, picture) -> np.ndarray:
        """(3, height, width) as stored to (height, width, 3) as shown."""
        return as_array(as_displayed(picture.numpy().transpose(1, 2, 0), self.metadata))
