"""An Intern-S1-Pro checkpoint's weights in, its parts as PyTorch modules out; written like Transformers', which has none.

Names of modules and parameters are those of the checkpoints. What is done with the parts is ``interns1_pro.py``'s.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter, WeightRenaming
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel

from filmstrip.models.interns1_pro_config import InternS1ProConfig
from filmstrip.models.interns1_pro_text import FourierPositionEmbedding, InternS1ProTextModel
from filmstrip.models.interns1_pro_time_series import TimeSeriesModel, WindowPositions


class InternS1ProParts(nn.Module):
    """Language model, vision tower and, if the checkpoint has one, time-series encoder."""

    def __init__(self, config: InternS1ProConfig) -> None:
        super().__init__()
        self.language_model = InternS1ProTextModel(config.text_config)
        self.visual = Qwen3VLMoeVisionModel(config.vision_config)
        self.time_series = None if config.ts_config is None else TimeSeriesModel(config.ts_config)


class InternS1ProForConditionalGeneration(PreTrainedModel):
    """All weights of a checkpoint (``from_pretrained``); the parts are called one by one, there is no forward pass."""

    config_class = InternS1ProConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012 - never changed
    # The first is what LMDeploy has and Whisper has not; the second follows from a formula.
    _keys_to_ignore_on_load_missing = [  # noqa: RUF012 - read by Transformers, never changed
        r"time_series\.encoder\.layers\.\d+\.self_attn\.k_proj\.bias",
        r"time_series\.encoder_embed\.pos_encoder\.pe",
    ]

    def __init__(self, config: InternS1ProConfig) -> None:
        super().__init__(config)
        self.model = InternS1ProParts(config)
        text_config = config.text_config
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's table."""
        return self.model.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """What makes logits."""
        return self.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FourierPositionEmbedding | WindowPositions):
            module.reset()


register_checkpoint_conversion_mapping(
    InternS1ProForConditionalGeneration.__name__,
    [
        WeightRenaming(r"\.block_sparse_moe\.", ".mlp."),
        # All experts in one tensor lie (experts, in, out) on disk; each for itself lies (out, in).
        WeightConverter("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", [Transpose(1, 2)]),
        WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", [Transpose(1, 2)]),
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            [MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter("mlp.experts.*.down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(dim=0)]),
    ],
    overwrite=True,
)
