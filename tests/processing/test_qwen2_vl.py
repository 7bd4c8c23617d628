"""What Qwen2-VL and Qwen2.5-VL are shown where the reference says nothing: parts of clips, uneven rates, clients' frames."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.errors import InvalidRequestError
from filmstrip.media.frames import frame_times
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.checkpoint_files import CheckpointFiles
from filmstrip.processing.inspection import inspect_item, view_of_checkpoint
from filmstrip.processing.media_pipeline import MediaPipeline
from filmstrip.processing.placeholders import Placeholder, assemble
from filmstrip.processing.preview import Previewer
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.processing.qwen2_vl import Qwen2VLProcessor, Qwen25VLProcessor
from filmstrip.processing.tokenizer import Tokenizer
from filmstrip.types import FrameSampling, FrameTiming, MediaItem, Modality, PixelLimits, VideoMetadata
from tests.models.qwen2_vl import TOKENS_PER_SECOND, make_qwen2_5_vl, make_qwen2_vl
from tests.parity.clips import make_clip, make_picture


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


def processor_of(path, kind=Qwen25VLProcessor, form="auto", **media):
    config = ProcessorConfig(video_prompt_form=form)
    return kind(Tokenizer(path), CheckpointFiles(path), config, MediaConfig(**media))


def metadata_of(timestamps, duration, *, height=96, width=128) -> VideoMetadata:
    times = np.asarray(timestamps, float)
    return VideoMetadata(len(times), len(times) / duration, duration, height, width, times, "test")


def steady(num_frames=120, fps=30.0, **size) -> VideoMetadata:
    return metadata_of(np.arange(num_frames) / fps, num_frames / fps, **size)


def planned(processor, metadata, *, frame_urls=(), **sampling) -> PlannedMedia:
    """What the pipeline makes of a clip, or (``frame_urls``) of frames picked by a client."""
    url = None if frame_urls else "clip"
    item = MediaItem(Modality.VIDEO, url=url, frame_urls=frame_urls, sampling=FrameSampling(**sampling))
    return MediaPipeline(None, processor, 0).plan_media(item, metadata)  # pyright: ignore[reportArgumentType]


def placed(processor, media) -> list[Placeholder]:
    return [piece for piece in processor._video_pieces(0, media) if isinstance(piece, Placeholder)]


def times_of(processor, media) -> list[int]:
    return [piece.time for piece in placed(processor, media)]


def test_groups_stand_as_far_apart_as_their_time(path, other_path):
    media = planned(processor_of(path), steady())
    assert media.plan.frame_indices == tuple(range(0, 120, 15))
    assert media.seconds_per_frame == 0.5
    assert times_of(processor_of(path), media) == [0, TOKENS_PER_SECOND, 2 * TOKENS_PER_SECOND, 3 * TOKENS_PER_SECOND]
    assert times_of(processor_of(other_path, Qwen2VLProcessor), media) == [0, 1, 2, 3]


def test_fewer_frames_of_a_clip_stand_further_apart(path):
    processor = processor_of(path)
    media = planned(processor, steady(), num_frames=4)
    assert media.seconds_per_frame == 1.0
    assert times_of(processor, media) == [0, 2 * TOKENS_PER_SECOND]


def test_a_part_of_a_clip_counts_as_a_clip(path):
    """Half as long with as many frames: half as far apart."""
    processor = processor_of(path)
    media = planned(processor, steady(), num_frames=4, start_seconds=1.0, end_seconds=2.99)
    assert media.timestamps[0] == 1.0
    assert media.seconds_per_frame == pytest.approx(0.5)
    assert times_of(processor, media) == [0, TOKENS_PER_SECOND]
    media = planned(processor, steady(), start_seconds=1.0, end_seconds=2.99)
    assert media.plan.frame_indices == (30, 45, 60, 75)


def test_uneven_rates_count_by_the_time_that_passes(path):
    """The last second has as many frames as the nine before; looking at it alone, its own rate counts."""
    times = [*np.arange(0, 9, 0.9), *np.arange(9, 10, 0.1)]
    metadata = metadata_of(times, 10.0)
    processor = processor_of(path)
    assert planned(processor, metadata, num_frames=10).seconds_per_frame == pytest.approx(1.0)
    assert planned(processor, metadata, num_frames=5, start_seconds=9.0).seconds_per_frame == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("timing", "seconds"),
    [
        (FrameTiming(fps=4.0), 0.25),
        (FrameTiming(timestamps=(100.0, 103.0, 106.0, 109.0)), 3.0),
        (FrameTiming(fps=25.0, frames_indices=(0, 50, 100, 150), total_num_frames=200), 2.0),
        (FrameTiming(), 0.5),
    ],
)
def test_frames_of_a_client_stand_apart_by_their_own_times(path, timing, seconds):
    times = frame_times(4, timing)
    metadata = VideoMetadata(4, times.fps, times.duration, 96, 128, times.timestamps, "frames")
    processor = processor_of(path)
    media = planned(processor, metadata, frame_urls=("a", "b", "c", "d"))
    assert media.plan.frame_indices == (0, 1, 2, 3)
    assert media.seconds_per_frame == pytest.approx(seconds)
    assert times_of(processor, media) == [0, int(2 * seconds * TOKENS_PER_SECOND)]
    fewer = planned(processor, metadata, frame_urls=("a", "b", "c", "d"), max_frames=2)
    assert fewer.seconds_per_frame == pytest.approx(2 * seconds)
    start, end = times.timestamps[1:3]
    part = planned(processor, metadata, frame_urls=("a", "b", "c", "d"), start_seconds=start, end_seconds=end)
    assert part.plan.frame_indices == (1, 2)
    assert part.seconds_per_frame == pytest.approx(seconds)


def test_times_beyond_counting_are_refused(path, other_path):
    metadata = metadata_of([0.0, 4e8, 8e8], 12e8)
    media = planned(processor_of(path), metadata, frame_urls=("a", "b", "c"))
    with pytest.raises(InvalidRequestError, match=r"4e\+08 seconds apart.* up to 2\.39675e\+06 seconds"):
        placed(processor_of(path), media)
    assert times_of(processor_of(other_path, Qwen2VLProcessor), media) == [0, 1]


def test_limits_of_a_request_count_all_frames_and_those_of_files_one(path):
    processor = processor_of(path)
    metadata = steady(height=480, width=640)
    plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(), presampled=False)
    assert 0.7 * 40_000 < plan.height * plan.width <= 40_000
    plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(max_pixels=80_000), presampled=False)
    assert len(plan.frame_indices) == 8
    assert 0.5 * 10_000 < plan.height * plan.width <= 10_000
    plan = processor.plan_video(steady(), FrameSampling(), PixelLimits(min_pixels=8 * 90_000), presampled=False)
    assert plan.height * plan.width >= 90_000
    plan = processor.plan_video(metadata, FrameSampling(), PixelLimits(max_pixels=1), presampled=False)
    assert (plan.height, plan.width) == (28, 28)


@pytest.mark.parametrize(
    ("num_frames", "sampling", "count"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (7, {}, 4),
        (120, {"max_frames": 7}, 6),
        (120, {"max_frames": 1}, 1),
        (120, {"min_frames": 20}, 20),
        (120, {"num_frames": 5}, 5),
    ],
)
def test_numbers_of_frames(path, num_frames, sampling, count):
    """Whole groups where the model's own rule chooses and there are as many; what is asked for is kept to."""
    media = planned(processor_of(path), steady(num_frames), **sampling)
    assert len(set(media.plan.frame_indices)) == len(media.plan.frame_indices) == count
    assert max(media.plan.frame_indices) < num_frames
    assert len(placed(processor_of(path), media)) == -(-count // 2)


def test_the_server_limits_frames(path):
    assert len(planned(processor_of(path, max_video_frames=5), steady()).plan.frame_indices) == 4


@pytest.mark.parametrize("form", ["auto", "nested", "flat"])
def test_start_and_end_around_a_video_stay(path, form):
    """In every form: there are no times in words to stand between them. The place of the text behind the video differs."""
    processor = processor_of(path, form=form)
    ids = Tokenizer(path).special_tokens
    start, pad, end = (ids[f"<|{name}|>"] for name in ("vision_start", "video_pad", "vision_end"))
    pieces = processor.expand(["look: ", start, pad, end, "well?"], [planned(processor, steady())])
    kinds = [piece if not isinstance(piece, Placeholder) else "group" for piece in pieces]
    assert kinds == ["look: ", start, *["group"] * 4, end, "well?"]
    assembled = assemble(pieces, lambda text: [1])
    positions, _ = processor.positions(assembled)
    assert positions is not None
    largest_of_video = positions[:, :-2].max()
    assert (positions[0, -2] > largest_of_video) == (form == "flat")


def test_previews_and_inspection_say_what_a_prompt_has(path, other_path, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", 60, 160, 96, rate=15)
    picture = make_picture(tmp_path / "picture.png", 120, 90)
    parts = [
        {"type": "video_url", "video_url": {"url": str(clip)}},
        {"type": "image_url", "image_url": {"url": str(picture)}},
    ]

    async def ask(model):
        config = LLMConfig(EngineConfig(model), MediaConfig(num_decode_threads=2))
        builder = PromptBuilder(config)
        try:
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
            alone = [{"role": "user", "content": parts[:1]}]
            return (
                await Previewer(builder).preview(messages, max_model_len=4096),
                await builder.build(messages, max_model_len=4096, report=lambda _: None),
                await inspect_item(MediaItem(Modality.VIDEO, url=str(clip)), view_of_checkpoint(config), config.media),
                await builder.build(alone, max_model_len=4096, report=lambda _: None),
            )
        finally:
            await builder.close()

    for model in (path, other_path):
        preview, prompt, inspection, alone = asyncio.run(ask(model))
        assert preview.num_prompt_tokens == len(prompt.token_ids)
        assert [item.num_tokens for item in preview.items] == [record.num_tokens for record in prompt.media]
        assert [list(item.frame_indices) for item in preview.items] == [r.frame_indices for r in prompt.media]
        assert inspection.num_prompt_tokens == len(alone.token_ids)
        segments = prompt.features[0].segments
        assert len(segments) == 4
        assert all(one.end == following.offset for one, following in itertools.pairwise(segments))
