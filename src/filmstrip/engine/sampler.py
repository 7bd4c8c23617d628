"""Logits to tokens, each request by its own parameters; knows no model and no blocks.

Rows never influence each other: every random draw comes from the request's own generator, so an answer does not depend on
who else is in the batch. Order of operations and meaning of the parameters are vLLM's: penalties, temperature, min_p, top_k,
top_p. Ties go to the lowest token id.
"""

from __future__ import annotations

import torch

from filmstrip.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken as 0: dividing by them overflows, and the likeliest token is all that is left."""
_SMALLEST_FACTOR = 1e-30
"""Repetition penalties below this would be 0 in single precision, and their quotients not numbers."""


class SamplingState:
    """What sampling remembers about one request between steps."""

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int], vocab_size: int, seed: int) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if params.temperature >= GREEDY_BELOW:
            self.generator = torch.Generator().manual_seed((params.seed if params.seed is not None else seed) % 2**63)
        self._output_counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._output_counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            # A prompt may carry ids of placeholders outside the vocabulary; they have no logit to change.
            self._seen[[token for token in set(prompt_token_ids) if 0 <= token < vocab_size]] = True

    @property
    def is_plain(self) -> bool:
        """Whether the token is simply the likeliest."""
        return self.generator is None and self._seen is None and self._output_counts is None

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
            factor = max(params.repetition_penalty, _SMALLEST_FACTOR)
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._seen.to(logits.device), penalised, logits)
        if self._output_counts is not None:
            counts = self._output_counts.to(logits.device)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        return logits.clamp(max=torch.finfo(logits.dtype).max)


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[int | None]:
    """One token per row of fp32 ``logits`` (R, vocab_size); None for a row with NaN, +inf or nothing finite.

    Greedy rows are taken together; the others one by one, which costs little beside the forward pass that made them.
    """
    if not states:
        return []
    highest, likeliest = logits.max(-1)
    usable, likeliest = torch.isfinite(highest).tolist(), likeliest.tolist()
    tokens: list[int | None] = []
    for row, state in enumerate(states):
        if not usable[row]:
            tokens.append(None)
        elif state.is_plain:
            tokens.append(likeliest[row])
        elif state.generator is None:
            tokens.append(int(state.penalise(logits[row]).argmax()))
        else:
            tokens.append(_draw(state.penalise(logits[row]), state.params, state.generator))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from softmax(logits / temperature), cut by min_p, top_k and top_p."""
    logits = logits.cpu()
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, -1)
    if params.min_p > 0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if params.top_k <= 0 and params.top_p >= 1:
        return _pick(probabilities, generator)
    tokens = _likeliest_first(probabilities, params.top_k, params.top_p)
    values = probabilities[tokens]
    if params.top_p < 1:
        values /= values.sum() if params.top_k > 0 else probabilities.sum()
        # Keep the smallest set that reaches top_p: a token stays if what stands before it does not reach it yet. The
        # likeliest always stays, even where top_p is 0 in single precision.
        values[1:][(values.cumsum(-1) - values)[1:] >= params.top_p] = 0
    return int(tokens[_pick(values, generator)])


def _likeliest_first(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Ids of all tokens that ``top_k`` (0 or less: none) and then ``top_p`` can leave, likeliest first, equals by id.

    Sorting only what has a chance is much faster than sorting a whole vocabulary. Tokens less likely than
    ``(1 - top_p) / vocab_size`` have at most the probability ``1 - top_p`` all together: the others reach ``top_p``.
    """
    if 0 < top_k < len(probabilities):
        lowest = torch.topk(probabilities, top_k).values[-1]
    elif top_k <= 0 and top_p < 1:
        lowest = probabilities.sum() * ((1 - top_p) / len(probabilities) / 2)  # half: sums are rounded
    else:
        lowest = probabilities.new_zeros(())
    candidates = torch.nonzero(probabilities >= lowest).flatten()
    order = torch.sort(probabilities[candidates], descending=True, stable=True).indices
    return candidates[order[:top_k] if top_k > 0 else order]


def _pick(weights: torch.Tensor, generator: torch.Generator) -> int:
    """An index with a chance in proportion to its weight: where one uniform number falls in the running sum.

    The sum is kept in double precision: over a vocabulary, single precision would lose the small ones.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    place = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    # The first sum beyond the place; rounding may put the place on the very end, where the last token with a chance is.
    return min(int(torch.searchsorted(sums, place, right=True)), int(torch.searchsorted(sums, sums[-1])))
