"""What Qwen3-Omni's thinker is shown where the reference leaves a choice: rates, numbers, clients' frames, sizes."""

from __future__ import annotations

import numpy as np
import pytest

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.media.frames import frame_times
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.inspection import view_of_checkpoint
from filmstrip.processing.media_pipeline import MediaPipeline
from filmstrip.processing.placeholders import Placeholder
from filmstrip.processing.registry import create_processor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, FrameTiming, MediaItem, Modality, PixelLimits, VideoMetadata
from tests.models.qwen3_omni import PLACES_PER_SECOND, make_qwen3_omni, make_qwen3_omni_thinker


@pytest.fixture(scope="module", params=[make_qwen3_omni, make_qwen3_omni_thinker])
def path(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("omni"))


@pytest.fixture(scope="module")
def processor(path):
    return create_processor(Tokenizer(path), CheckpointFiles(path), ProcessorConfig(), MediaConfig())


def clip(num_frames=90, fps=30.0, *, height=96, width=128) -> VideoMetadata:
    return VideoMetadata(num_frames, fps, num_frames / fps, height, width, np.arange(num_frames) / fps, "test")


def planned(processor, metadata, *, frame_urls=(), **sampling) -> PlannedMedia:
    """What the pipeline makes of a clip, or (``frame_urls``) of frames picked by a client."""
    url = None if frame_urls else "clip"
    item = MediaItem(Modality.VIDEO, url=url, frame_urls=frame_urls, sampling=FrameSampling(**sampling))
    return MediaPipeline(None, processor, 0).plan_media(item, metadata)  # pyright: ignore[reportArgumentType]


def seconds_apart(processor, media) -> float:
    """Between the first two temporal groups."""
    first, second, *_ = (piece.time for piece in processor._video_pieces(0, media) if isinstance(piece, Placeholder))
    assert first == 0
    return second / PLACES_PER_SECOND


def test_a_rate_is_the_time_between_frames(processor):
    """Also where whole groups, a least or a largest number of frames make it another number."""
    assert seconds_apart(processor, planned(processor, clip())) == 1.0
    assert seconds_apart(processor, planned(processor, clip(), fps=1.5)) == pytest.approx(4 / 3)
    assert seconds_apart(processor, planned(processor, clip(5, 2.0))) == 1.0
    assert seconds_apart(processor, planned(processor, clip(30))) == 1.0
    assert seconds_apart(processor, planned(processor, clip(3000), max_frames=8)) == 1.0
    assert seconds_apart(processor, planned(processor, clip(3000), start_seconds=3, end_seconds=9)) == 1.0


def test_a_number_of_frames_is_spread_over_the_true_time(processor):
    assert seconds_apart(processor, planned(processor, clip(), num_frames=4)) == pytest.approx(1.5)
    assert seconds_apart(processor, planned(processor, clip(), num_frames=4, fps=10)) == pytest.approx(1.5)
    assert seconds_apart(processor, planned(processor, clip(), fps=-1)) == pytest.approx(2 / 30)


@pytest.mark.parametrize(
    ("timing", "seconds"),
    [(FrameTiming(fps=4.0), 0.5), (FrameTiming(timestamps=(10.0, 13.0, 16.0, 19.0)), 6.0), (FrameTiming(), 1.0)],
)
def test_frames_of_a_client_stand_apart_by_their_own_times(processor, timing, seconds):
    times = frame_times(4, timing)
    metadata = VideoMetadata(4, times.fps, times.duration, 96, 128, times.timestamps, "frames")
    media = planned(processor, metadata, frame_urls=("a", "b", "c", "d"), fps=1.0)
    assert media.plan.frame_indices == (0, 1, 2, 3)
    assert seconds_apart(processor, media) == pytest.approx(seconds)


def test_times_beyond_counting_are_refused(processor):
    times = np.array([0.0, 4e8, 8e8])
    metadata = VideoMetadata(3, 3 / 12e8, 12e8, 96, 128, times, "frames")
    media = planned(processor, metadata, frame_urls=("a", "b", "c"))
    with pytest.raises(InvalidRequestError, match=r"4e\+08 seconds apart.* up to 1\.29056e\+06 seconds"):
        list(processor._video_pieces(0, media))


def test_limits_of_a_request_count_all_frames_and_the_familys_one(processor):
    def size(**limits):
        metadata = clip(height=2000, width=3000)
        plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(**limits), presampled=False)
        assert len(plan.frame_indices) == 6
        return plan.height * plan.width

    assert 0.9 * 786_432 < size() <= 786_432
    assert 0.8 * 100_000 < size(max_pixels=600_000) <= 100_000


def test_the_context_is_the_thinkers(path):
    view = view_of_checkpoint(LLMConfig(EngineConfig(path), MediaConfig(), ProcessorConfig()))
    assert view.max_model_len == 32768
