"""Prompts with media for model tests, put together by hand: ids, placeholder ranges, patches, the reference's inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from filmstrip.models.base import EncoderInput, Model
from filmstrip.models.qwen_vl import normalize_patches
from filmstrip.types import Modality, Normalization, PlaceholderRange
from tests.models.batches import PackedRequest

NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PATCH_ROW = 3 * 2 * 16 * 16


@dataclass
class MediaPart:
    """One image or video: uint8 patches, their grid, and the range of each temporal group in the prompt."""

    modality: Modality
    grid_thw: tuple[int, int, int]
    patches: torch.Tensor
    segments: list[PlaceholderRange] = field(default_factory=list)

    @property
    def encoder_input(self) -> EncoderInput:
        """The whole item as one input of the encoder."""
        return EncoderInput(self.modality, self.patches, self.grid_thw, NORMALIZATION, len(self.segments))


class PromptBuilder:
    """Appends text and media; special ids come from a checkpoint's config."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.token_ids: list[int] = []
        self.types: list[int] = []
        self.media: list[MediaPart] = []

    def text(self, num_tokens: int) -> PromptBuilder:
        """Random text tokens below every special id."""
        return self.ids(torch.randint(0, 500, (num_tokens,), generator=self.generator).tolist())

    def ids(self, token_ids: list[int]) -> PromptBuilder:
        """These tokens, as text."""
        self.token_ids += token_ids
        self.types += [0] * len(token_ids)
        return self

    def image(self, grid_h: int, grid_w: int) -> PromptBuilder:
        """An image of random patches between vision_start and vision_end."""
        self._media(Modality.IMAGE, (1, grid_h, grid_w))
        return self

    def video(self, grid_t: int, grid_h: int, grid_w: int) -> PromptBuilder:
        """A video of random patches: each temporal group has three timestamp tokens and its own vision_start/vision_end."""
        self._media(Modality.VIDEO, (grid_t, grid_h, grid_w))
        return self

    def _media(self, modality: Modality, grid: tuple[int, int, int]) -> None:
        num_patches = grid[0] * grid[1] * grid[2]
        # Smooth noise: pictures differ from each other in more than what averages out.
        patches = torch.randint(0, 256, (num_patches, 3, 1), generator=self.generator).expand(-1, -1, PATCH_ROW // 3)
        noise = torch.randint(-40, 41, (num_patches, PATCH_ROW), generator=self.generator)
        part = MediaPart(modality, grid, (patches.flatten(1) + noise).clamp(0, 255).to(torch.uint8))
        is_video = modality is Modality.VIDEO
        token_id = self.config.video_token_id if is_video else self.config.image_token_id
        length = grid[1] * grid[2] // 4
        for _ in range(grid[0]):
            if is_video:
                self.text(3)
            self.ids([self.config.vision_start_token_id])
            part.segments.append(PlaceholderRange(len(self.token_ids), length))
            self.token_ids += [token_id] * length
            self.types += [2 if is_video else 1] * length
            self.ids([self.config.vision_end_token_id])
        self.media.append(part)

    def reference_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the Transformers model for the same prompt."""
        inputs = {"input_ids": torch.tensor([self.token_ids]), "mm_token_type_ids": torch.tensor([self.types])}
        for modality, pixels, grid in (
            (Modality.IMAGE, "pixel_values", "image_grid_thw"),
            (Modality.VIDEO, "pixel_values_videos", "video_grid_thw"),
        ):
            parts = [part for part in self.media if part.modality is modality]
            if parts:
                inputs[pixels] = torch.cat([normalize_patches(part.patches, NORMALIZATION) for part in parts])
                inputs[grid] = torch.tensor([part.grid_thw for part in parts])
        return inputs

    def request(self, model: Model, reference: Any, blocks: list[int]) -> PackedRequest:
        """The request with positions from ``reference`` and embeddings from ``model``."""
        inputs = self.reference_inputs()
        positions, _ = reference.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )
        encoded = model.encode([part.encoder_input for part in self.media])
        media = [
            (place, rows)
            for part, segments in zip(self.media, encoded, strict=True)
            for place, rows in zip(part.segments, segments, strict=True)
        ]
        return PackedRequest(list(self.token_ids), positions[:, 0], blocks, media)
