"""Videos through Decord and its own FFmpeg, from memory; knows nothing of how frames are checked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

import decord
import decord.logging

from filmstrip.media.decoders.checked import Check, CheckedReader, DecodedFrame, References, as_array

_NO_RECOVERED_FRAMES = 1e-9
"""Share of frames that may be replaced by others before Decord raises; zero would mean that all may."""

decord.logging.set_level(decord.logging.QUIET)


class DecordReader(CheckedReader):
    """Frames by index. Decord keeps the whole file in memory.

    It tells the times of its index, not of the pictures it gives, so each picture is compared with PyAV's.
    """

    name: ClassVar[str] = "decord"
    label: ClassVar[str] = "Decord"
    tells_times: ClassVar[bool] = False

    def frames(
        self,
        frame_indices: Sequence[int],
        num_threads: int,
        references: References,  # noqa: ARG002
        check: Check,
    ) -> Generator[DecodedFrame, None, None]:
        """See :meth:`CheckedReader.frames`."""
        with self.source.open() as file, self.failing_on("cannot open this video", check):
            video = decord.VideoReader(
                file,
                decord.cpu(0),
                num_threads=num_threads,
                fault_tol=_NO_RECOVERED_FRAMES,  # type: ignore[arg-type]  # a share is a float
            )
        total = self.metadata.total_num_frames
        if len(video) != total:
            raise self.refuse(f"counts {len(video)} frames where there are {total}")
        starts = video.get_frame_timestamp([0, *frame_indices])[:, 0]
        for index, start in zip(frame_indices, starts[1:], strict=True):
            yield DecodedFrame(as_array(video[index].asnumpy()), float(start - starts[0]))
