"""Logits to tokens, each request by its own parameters; knows no model and no blocks.

Rows never influence each other: every random draw comes from the request's own generator, so an answer does not depend on
who else is in the batch. Order of operations and meaning of the parameters are vLLM's: penalties, temperature, min_p, top_k,
top_p. Ties go to the lowest token id.
"""

from __future__ import annotations

import torch

from filmstrip.types import SamplingParams


class SamplingState:
    """What sampling remembers about one request between steps."""

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int], vocab_size: int, seed: int) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if params.temperature > 0:
            self.generator = torch.Generator().manual_seed((params.seed if params.seed is not None else seed) % 2**63)
        self._output_counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._output_counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            # A prompt may carry ids of placeholders beyond the vocabulary; they have no logit to change.
            self._seen[[token for token in set(prompt_token_ids) if token < vocab_size]] = True

    def observe(self, token: int) -> None:
        """Count a generated token."""
        if self._output_counts is not None:
            self._output_counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def penalise(self, logits: torch.Tensor) -> torch.Tensor:
        """One row of fp32 logits (vocab_size,) with the request's penalties; the row itself if it has none.

        Repetition divides positive and multiplies negative logits of every token seen in prompt or answer (Keskar et al.
        2019, CTRL); frequency and presence are subtracted for tokens of the answer (OpenAI's definition).
        """
        params = self.params
        if self._seen is not None:
            factor = params.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._seen.to(logits.device), penalised, logits)
        if self._output_counts is not None:
            counts = self._output_counts.to(logits.device)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        return logits


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[int | None]:
    """One token per row of fp32 ``logits`` (R, vocab_size); None for a row with NaN or without a finite logit.

    Greedy rows are taken together; the others one by one, which costs little beside the forward pass that made them.
    """
    usable = (torch.isfinite(logits).any(-1) & ~torch.isnan(logits).any(-1)).tolist()
    greedy = logits.argmax(-1).tolist()
    tokens: list[int | None] = []
    for row, state in enumerate(states):
        if not usable[row]:
            tokens.append(None)
            continue
        penalised = state.penalise(logits[row])
        if state.generator is not None:
            tokens.append(_draw(penalised, state.params, state.generator))
        else:
            tokens.append(greedy[row] if penalised.data_ptr() == logits[row].data_ptr() else int(penalised.argmax()))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from softmax(logits / temperature), cut by min_p, top_k and top_p."""
    probabilities = torch.softmax((logits / params.temperature).cpu(), -1)
    if params.min_p > 0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if params.top_k > 0 or params.top_p < 1:
        count = min(params.top_k, len(probabilities)) if params.top_k > 0 else len(probabilities)
        values, tokens = torch.sort(probabilities, descending=True, stable=True)
        values, tokens = values[:count], tokens[:count]
        if params.top_p < 1:
            values = values / values.sum()
            # Keep the smallest set that reaches top_p: a token stays if what stands before it does not reach it yet.
            values[values.cumsum(-1) - values >= params.top_p] = 0
    else:
        values, tokens = probabilities, None
    choice = int(torch.multinomial(values, 1, generator=generator))
    return choice if tokens is None else int(tokens[choice])
