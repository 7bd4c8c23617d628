"""Videos through TorchCodec and the system's FFmpeg, from a file object; knows nothing of how frames are checked."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import ClassVar

from torchcodec.decoders import VideoDecoder  # type: ignore[reportPrivateImportUsage]

from filmstrip.media.decoders.checked import Check, CheckedReader, DecodedFrame, References, as_array, sample


class TorchCodecReader(CheckedReader):
    """Frames by index in "exact" mode, each with the time of its picture."""

    name: ClassVar[str] = "torchcodec"
    label: ClassVar[str] = "TorchCodec"

    def frames(
        self,
        frame_indices: Sequence[int],
        num_threads: int,
        references: References,
        check: Check,
    ) -> Generator[DecodedFrame, None, None]:
        """See :meth:`CheckedReader.frames`."""
        with self.source.open() as file:
            with self.failing_on("cannot open this video", check):
                decoder = VideoDecoder(
                    file,  # type: ignore[arg-type]
                    dimension_order="NHWC",
                    num_ffmpeg_threads=num_threads,
                    device="cpu",
                    seek_mode="exact",
                )
            total = self.metadata.total_num_frames
            if len(decoder) != total:
                raise self.refuse(f"counts {len(decoder)} frames where there are {total}")
            begin = decoder.metadata.begin_stream_seconds_from_content or 0.0

            def frame_at(index: int) -> DecodedFrame:
                frame = decoder.get_frame_at(index)
                return DecodedFrame(as_array(frame.data.numpy()), frame.pts_seconds - begin)

            # Where packets have no times (AVI), TorchCodec's index and its pictures may be a frame apart.
            first = frame_at(0)
            self.check_form(0, first)
            references.compare(0, sample(first.rgb))
            for index in frame_indices:
                yield frame_at(index)
