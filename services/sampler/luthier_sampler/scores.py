"""What a request wants to know of its prompt's positions, filled in while the prompt is computed.

Dimensions: P prompt tokens, T positions that one call scores, V vocabulary, k alternatives.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier_sampler.drawing import argmax, draw

if TYPE_CHECKING:
    from luthier_sampler.sequence import SampleRequest

FILLER_TOKEN, FILLER_LOGPROB = 0, -99999.0
"""An unused cell of a TopkLogprobs table (wire protocol 4.3)."""


@dataclass(slots=True)
class TopkTable:
    """Rows of a TopkLogprobs message: int32 ids and float32 logprobs, [length, k]."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def filler(cls, length: int, k: int) -> "TopkTable":
        return cls(
            np.full((length, k), FILLER_TOKEN, np.int32),
            np.full((length, k), FILLER_LOGPROB, np.float32),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    def put(self, first: int, rows: "TopkTable") -> None:
        """Replace the rows from `first` on."""
        self.token_ids[first : first + len(rows)] = rows.token_ids
        self.logprobs[first : first + len(rows)] = rows.logprobs


def most_likely(logprobs_BV: Tensor, k: int) -> TopkTable:
    """The k most likely tokens of each row, most likely first; filler beyond the vocabulary."""
    table = TopkTable.filler(len(logprobs_BV), k)
    found = logprobs_BV.topk(min(k, logprobs_BV.shape[1]), dim=-1)
    table.token_ids[:, : found.indices.shape[1]] = found.indices.cpu().numpy()
    table.logprobs[:, : found.values.shape[1]] = found.values.cpu().numpy()
    return table


class PromptScores:
    """Logprobs are raw, whatever the deployment's sample_logprobs."""

    def __init__(self, spec: "SampleRequest", seed: int) -> None:
        num_tokens, num_alts = len(spec.prompt), spec.prompt_alt_tokens_k
        targets = spec.target_prompt_logprobs
        self._spec = spec
        self.first = _first_position(spec)
        """The first position to be scored; None if there is none. It needs the row before it."""
        self.logprobs = np.full(num_tokens, np.nan, np.float32)
        """[P]; NaN where nothing was asked for."""
        self.topk = TopkTable.filler(num_tokens, spec.topk_prompt_logprobs)
        self.target_logprobs = np.zeros(0 if targets is None else len(targets.tokens), np.float32)
        """One per cell of target_prompt_logprobs; 0 where that has -1."""
        self.alt_tokens = np.zeros((num_tokens, num_alts), np.int64)
        self.alt_logprobs = np.zeros((num_tokens, num_alts), np.float32)
        """[P, k]; row 0 stays empty."""
        # By position, not by call: how the prompt was cut into chunks does not change the draws.
        random = np.random.Generator(np.random.Philox(key=seed % 2**64))
        self._alt_uniforms = random.random((num_tokens if num_alts else 0, num_alts))

    def put(self, start: int, logits_TV: Tensor, prompt: list[int]) -> None:
        """Score positions start to start + T, which these float32 logits predict."""
        spec, stop = self._spec, start + len(logits_TV)
        logprobs_TV = logits_TV.log_softmax(-1)
        if spec.prompt_logprobs and stop > (first := _first_logprob(spec)):
            first = max(first, start)
            tokens_T = torch.tensor(prompt[first:stop], device=logits_TV.device)
            found_T1 = logprobs_TV[first - start :].gather(1, tokens_T[:, None])
            self.logprobs[first:stop] = found_T1[:, 0].cpu().numpy()
        if spec.topk_prompt_logprobs and stop > (first := _first_logprob(spec)):
            first = max(first, start)
            rows = most_likely(logprobs_TV[first - start :], spec.topk_prompt_logprobs)
            self.topk.put(first, rows)
        if spec.target_prompt_logprobs is not None:
            self._put_targets(start, stop, logprobs_TV)
        if spec.prompt_alt_tokens_k:
            self._put_alts(start, stop, logits_TV, logprobs_TV)

    def _put_targets(self, start: int, stop: int, logprobs_TV: Tensor) -> None:
        targets = self._spec.target_prompt_logprobs
        assert targets is not None
        cells = slice(*np.searchsorted(targets.positions, (start, stop)).tolist())
        rows = torch.from_numpy(targets.positions[cells] - start).to(logprobs_TV.device)
        tokens = torch.from_numpy(targets.tokens[cells]).to(logprobs_TV.device)
        found = logprobs_TV[rows, tokens.clamp(min=0)].masked_fill(tokens < 0, 0.0)
        self.target_logprobs[cells] = found.cpu().numpy()

    def _put_alts(self, start: int, stop: int, logits_TV: Tensor, logprobs_TV: Tensor) -> None:
        temperature = self._spec.temperature
        if temperature == 0:
            tokens_Tk = argmax(logits_TV)[:, None].expand(-1, self._spec.prompt_alt_tokens_k)
        else:
            uniforms_Tk = torch.from_numpy(self._alt_uniforms[start:stop]).to(logits_TV.device)
            tempered_TV = (logits_TV / temperature).log_softmax(-1)
            tokens_Tk = draw(tempered_TV, uniforms_Tk)
        self.alt_tokens[start:stop] = tokens_Tk.cpu().numpy()
        self.alt_logprobs[start:stop] = logprobs_TV.gather(1, tokens_Tk).cpu().numpy()


def _first_logprob(spec: "SampleRequest") -> int:
    """The first position of prompt_logprobs and topk_prompt_logprobs."""
    last_n = spec.prompt_logprobs_last_n
    return 1 if last_n is None else max(1, len(spec.prompt) - last_n)


def _first_position(spec: "SampleRequest") -> int | None:
    firsts = [len(spec.prompt)]
    if spec.prompt_logprobs or spec.topk_prompt_logprobs:
        firsts.append(_first_logprob(spec))
    if spec.prompt_alt_tokens_k:
        firsts.append(1)
    if spec.target_prompt_logprobs is not None:
        first = spec.target_prompt_logprobs.first_position
        firsts.append(len(spec.prompt) if first is None else first)
    return min(firsts) if min(firsts) < len(spec.prompt) else None
