"""What a running request has generated since it was last asked."""

from luthier_core.partials import RESEND_TOKENS, Partial, Topk, encode_partials
from luthier_sampler.scores import FILLER_LOGPROB, TopkTable
from luthier_sampler.sequence import Request, Sequence


def new_tokens(request: Request) -> str:
    """A message for the request's readers; empty if there is nothing new."""
    partials = [_partial(s) for s in request.sequences if s.num_new_tokens > s.num_told]
    return encode_partials(partials) if partials else ""


def _partial(sequence: Sequence) -> Partial:
    start = sequence.num_told
    sequence.num_told = sequence.num_new_tokens
    if start // RESEND_TOKENS < sequence.num_told // RESEND_TOKENS:
        start = 0
    return Partial(
        index=sequence.index,
        offset=start,
        tokens=sequence.tokens[sequence.num_prompt_tokens + start :],
        logprobs=sequence.logprobs[start:],
        topk=[_row(table) for table in sequence.topk[start:]],
    )


def _row(table: TopkTable) -> Topk:
    """The one row of the table without its filler."""
    pairs = zip(table.token_ids[0].tolist(), table.logprobs[0].tolist(), strict=True)
    return [(token, logprob) for token, logprob in pairs if logprob > FILLER_LOGPROB]
