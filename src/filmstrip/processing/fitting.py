"""How much of a request's media fits the context: fewer frames or pixels, found by planning; opens and decodes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from filmstrip.media.frames import is_presampled
from filmstrip.processing.base import PlannedMedia
from filmstrip.processing.media_pipeline import PlannedItem
from filmstrip.types import MediaItem, Modality

SMALL_FRAME_PIXELS = 128 * 128
"""Pictures are not made smaller than this to fit in more of them: of less, models see little."""

Plan = Callable[[MediaItem, PlannedItem], PlannedMedia]
"""What a model makes of an item whose wishes were changed."""
Fits = Callable[[Sequence[PlannedMedia]], bool]
"""Whether a prompt with these media leaves room for an answer."""


class Fitting:
    """Searches what fits, for the items of one request."""

    def __init__(self, planned: Sequence[PlannedItem], plan: Plan, fits: Fits) -> None:
        self._planned, self._plan, self._fits = planned, plan, fits

    def fits_now(self) -> bool:
        """Whether all fit as they are planned."""
        return self._fits([item.media for item in self._planned])

    def advice(self) -> str:
        """What to change of the largest item alone, or that nothing would help."""
        shown_smaller = [item for item in self._planned if item.media.modality is not Modality.TIME_SERIES]
        if not shown_smaller:
            return "a time series is shown whole: send less of it"
        largest = max(shown_smaller, key=lambda item: item.media.num_tokens)
        num_frames = largest.media.num_frames
        is_video = largest.media.modality is Modality.VIDEO
        ways = []
        fewer = self._most(num_frames - 1, lambda count: self._fits_with(largest, max_frames=count)) if is_video else 0
        if fewer:
            how = (
                "send fewer frames"
                if is_presampled(largest.item)
                else f"set media_io_kwargs.video.max_frames to {fewer}"
            )
            ways.append(f"{fewer} of the video's {num_frames} frames would fit: {how}")
        pixels = largest.media.height * largest.media.width * num_frames
        fewer = self._most(pixels, lambda count: self._fits_with(largest, max_pixels=count))
        if fewer:
            ways.append(
                f"{'lower' if ways else 'set'} mm_processor_kwargs.{largest.media.modality}.max_pixels to {fewer}"
            )
        if ways:
            return ", or ".join(ways) + '; or let the server choose with "media_overflow": "fit"'
        what = f"not even one of the video's {num_frames} frames" if is_video else "not even the smallest picture"
        return f"{what} would fit beside the rest"

    def fit(self) -> list[MediaItem] | None:
        """The items with wishes lowered so that all fit; None if that cannot be.

        First all pictures and frames lose pixels, the largest most, down to :data:`SMALL_FRAME_PIXELS`; then videos lose
        frames, the longest most; then what is left loses pixels again. Time series lose nothing.
        """
        sizes = [item.media.height * item.media.width for item in self._planned]
        if self._fits(self._all_planned(SMALL_FRAME_PIXELS, None)):
            pixels = self._most(
                max(sizes), lambda count: self._fits(self._all_planned(count, None)), SMALL_FRAME_PIXELS
            )
            return self._all_items(pixels, None)
        most_frames = max(item.media.num_frames for item in self._planned)
        frames = self._most(most_frames, lambda count: self._fits(self._all_planned(SMALL_FRAME_PIXELS, count)))
        if frames:
            return self._all_items(SMALL_FRAME_PIXELS, frames)
        pixels = self._most(SMALL_FRAME_PIXELS, lambda count: self._fits(self._all_planned(count, 1)))
        return self._all_items(pixels, 1) if pixels else None

    def _most(self, high: int, is_good: Callable[[int], bool], low: int = 0) -> int:
        """The largest good number up to ``high``, ``low`` being known as good; ``low`` if none is found above it."""
        if high > low and is_good(high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_good(middle) else (low, middle)
        return low

    def _fits_with(self, changed: PlannedItem, *, max_frames: int | None = None, max_pixels: int | None = None) -> bool:
        item = _with_less(changed.item, max_frames=max_frames, max_pixels=max_pixels)
        return self._fits([self._plan(item, other) if other is changed else other.media for other in self._planned])

    def _all_planned(self, frame_pixels: int, max_frames: int | None) -> list[PlannedMedia]:
        items = self._all_items(frame_pixels, max_frames)
        return [self._plan(item, planned) for item, planned in zip(items, self._planned, strict=True)]

    def _all_items(self, frame_pixels: int, max_frames: int | None) -> list[MediaItem]:
        return [self._item(planned, frame_pixels, max_frames) for planned in self._planned]

    def _item(self, planned: PlannedItem, frame_pixels: int, max_frames: int | None) -> MediaItem:
        if planned.media.modality is Modality.TIME_SERIES:
            return planned.item
        plan = planned.media.plan
        num_frames = min(len(plan.frame_indices), max_frames or len(plan.frame_indices))
        if plan.height * plan.width <= frame_pixels and num_frames == len(plan.frame_indices):
            return planned.item
        # Each of the frames left may have what it had, and no more than its share.
        pixels = min(plan.height * plan.width, frame_pixels) * max(num_frames, plan.layout.temporal_patch_size)
        is_video = planned.media.modality is Modality.VIDEO
        return _with_less(
            planned.item,
            max_frames=num_frames if is_video else None,
            max_pixels=pixels if is_video else min(plan.height * plan.width, frame_pixels),
        )


def _with_less(item: MediaItem, *, max_frames: int | None = None, max_pixels: int | None = None) -> MediaItem:
    sampling, pixels = item.sampling, item.pixels
    if max_frames is not None:
        lowest = max_frames if sampling.max_frames is None else min(max_frames, sampling.max_frames)
        floor = None if sampling.min_frames is None else min(sampling.min_frames, lowest)
        sampling = dataclasses.replace(sampling, max_frames=lowest, min_frames=floor)
    if max_pixels is not None:
        lowest = max_pixels if pixels.max_pixels is None else min(max_pixels, pixels.max_pixels)
        floor = None if pixels.min_pixels is None else min(pixels.min_pixels, lowest)
        pixels = dataclasses.replace(pixels, max_pixels=lowest, min_pixels=floor)
    return dataclasses.replace(item, sampling=sampling, pixels=pixels)
