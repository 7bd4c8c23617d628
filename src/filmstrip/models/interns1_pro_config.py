"""The fields of an Intern-S1-Pro checkpoint's config.json in, Transformers configurations out; knows no weights.

Transformers has no classes for this family. What is Qwen3-MoE, Qwen3-VL or Whisper of it is configured by their classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen3MoeConfig, WhisperConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeVisionConfig

FOPE_KEYS = frozenset({"fope_sep_head", "fope_num_inv_freq", "fope_init_factor", "num_inv_freq"})
"""Rotary parameters of which any says that positions are FoPE's."""


class InternS1ProTextConfig(Qwen3MoeConfig):
    """Qwen3-MoE with a grouped router and FoPE.

    ``router_n_groups`` is how many groups the experts are chosen from, each alike; none or -1 for plain Qwen3-MoE. FoPE is
    configured among the rotary parameters (:data:`FOPE_KEYS`).
    """

    model_type = "interns1_pro_text"
    base_config_key = "text_config"
    ignore_keys_at_rope_validation = set(FOPE_KEYS)  # noqa: RUF012 - read by Transformers, never changed

    router_n_groups: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # "fope" is no type that Transformers knows: its frequencies are those of the default type.
        self.rope_parameters = _without_fope_type(self.rope_parameters)
        if kwargs.get("rope_scaling") is not None:
            kwargs["rope_scaling"] = _without_fope_type(kwargs["rope_scaling"])
        super().__post_init__(**kwargs)

    @property
    def num_expert_groups(self) -> int:
        """Groups that experts are chosen from; 1 for plain Qwen3-MoE."""
        return max(1, self.router_n_groups or 1)

    @property
    def has_fope(self) -> bool:
        """Whether positions are FoPE's, not plain rotary ones."""
        return not FOPE_KEYS.isdisjoint(self.rope_parameters or {})

    @property
    def fope_num_inv_freq(self) -> int | None:
        """Frequencies that FoPE keeps, counted from the highest; None: those with a period in the context."""
        rope: Mapping[str, Any] = self.rope_parameters or {}
        given = rope.get("fope_num_inv_freq")
        return rope.get("num_inv_freq") if given is None else given


class InternS1ProVisionConfig(Qwen3VLMoeVisionConfig):
    """Qwen3-VL's vision tower without DeepStack, whatever a checkpoint says of it."""

    model_type = "interns1_pro_vision"
    base_config_key = "vision_config"

    def __post_init__(self, **kwargs: Any) -> None:
        self.deepstack_visual_indexes = ()
        super().__post_init__(**kwargs)


class InternS1ProTimeSeriesConfig(WhisperConfig):
    """Whisper's encoder between adapters, for time series.

    ``ts_adapt_in_dim`` numbers come in for each step, ``ts_adapt_out_dim`` (= ``ts_hidden_dim``) leave the encoder and
    ``out_hidden_size`` go to the language model.
    """

    model_type = "interns1_pro_time_series"
    base_config_key = "ts_config"

    ts_adapt_in_dim: int = 256
    ts_adapt_out_dim: int = 1024
    ts_hidden_dim: int = 1024
    out_hidden_size: int = 4096


class InternS1ProConfig(PreTrainedConfig):
    """An Intern-S1-Pro checkpoint; without ``ts_config`` it takes no time series."""

    model_type = "interns1_pro"
    sub_configs = {  # noqa: RUF012  # pyright: ignore - a mapping for all versions of Transformers, never changed
        "text_config": InternS1ProTextConfig,
        "vision_config": InternS1ProVisionConfig,
        "ts_config": InternS1ProTimeSeriesConfig,
    }

    def __init__(
        self,
        text_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        vision_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        ts_config: Mapping[str, Any] | PreTrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """Each part as a configuration, as its fields, or None for the defaults (``ts_config``: for no such part)."""
        self.text_config = _part(InternS1ProTextConfig, text_config)
        self.vision_config = _part(InternS1ProVisionConfig, vision_config)
        self.ts_config = None if ts_config is None else _part(InternS1ProTimeSeriesConfig, ts_config)
        super().__init__(**kwargs)


def _part(config_class: type[PreTrainedConfig], fields: Mapping[str, Any] | PreTrainedConfig | None) -> Any:
    return fields if isinstance(fields, PreTrainedConfig) else config_class(**(fields or {}))


def _without_fope_type(rope: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if rope is None:
        return None
    return {
        key: "default" if key in ("rope_type", "type") and value == "fope" else value for key, value in rope.items()
    }
