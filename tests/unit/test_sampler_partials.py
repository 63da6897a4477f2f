"""What a sampler tells of requests that run: every token once, and all of them now and then."""

from luthier_core.partials import RESEND_TOKENS, Partial, decode_partials
from luthier_sampler.partials import new_tokens
from luthier_sampler.sequence import Request, SampleRequest


def running(num_samples: int = 1) -> Request:
    spec = SampleRequest(request_id="a", prompt=(1, 2, 3), num_samples=num_samples)
    return Request(
        spec, arrival=0, seed=0, max_new_tokens=500, adapter=None, stop_tokens=frozenset()
    )


def generate(request: Request, index: int, *tokens: int) -> None:
    sequence = request.sequences[index]
    sequence.tokens += tokens
    sequence.logprobs += [-float(token) for token in tokens]


def test_only_what_is_new_is_told_and_where_it_belongs() -> None:
    request = running(num_samples=2)
    assert new_tokens(request) == ""
    generate(request, 0, 7, 8)
    assert decode_partials(new_tokens(request)) == [Partial(0, 0, [7, 8], [-7.0, -8.0], [])]
    assert new_tokens(request) == ""
    generate(request, 0, 9)
    generate(request, 1, 5)
    told = decode_partials(new_tokens(request))
    assert told == [Partial(0, 2, [9], [-9.0], []), Partial(1, 0, [5], [-5.0], [])]


def test_a_reader_that_missed_a_message_gets_all_tokens_again() -> None:
    request = running()
    told = []
    for token in range(2 * RESEND_TOKENS):
        generate(request, 0, token)
        told += decode_partials(new_tokens(request))
    whole = [partial for partial in told if partial.offset == 0]
    assert [len(partial.tokens) for partial in whole] == [1, RESEND_TOKENS, 2 * RESEND_TOKENS]
    assert whole[-1].tokens == list(range(2 * RESEND_TOKENS))
