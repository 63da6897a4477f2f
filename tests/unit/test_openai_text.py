"""From tokens to text while they come: nothing is lost, and no part of a stop string is told."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from luthier_core.errors import Unsupported
from luthier_gateway.openai.model_text import ModelText
from luthier_gateway.openai.text import TextDecoder, Token, Transcript

BYTES = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TEXTS = st.text(st.sampled_from("ab é€😀\n"), max_size=30)


def byte_tokenizer() -> Tokenizer:
    """One token per byte: every character beyond ASCII spans tokens."""
    tokenizer = Tokenizer(models.BPE(vocab=dict(BYTES), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def decode(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens))


def transcript(*stops: str, eos: frozenset[int] = frozenset()) -> Transcript:
    return Transcript(TextDecoder(decode), eos, stops)


def pieces_of(made: Transcript, tokens: list[int]) -> tuple[list[str], list[Token]]:
    pieces = [made.push([token], [-1.0], []) for token in tokens]
    pieces.append(made.end())
    return [piece.text for piece in pieces], [token for piece in pieces for token in piece.tokens]


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_the_pieces_are_the_text_and_no_character_is_told_in_parts(text: str) -> None:
    tokens = TOKENIZER.encode(text).ids
    pieces, told = pieces_of(transcript(), tokens)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [token.token for token in told] == tokens


def until_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first."""
    for end in range(len(text) + 1):
        if found := [at for at in map(text[:end].find, stops) if at >= 0]:
            return text[: min(found)]
    return text


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.text("ab é€", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    pieces, told = pieces_of(transcript(*stops), TOKENIZER.encode(text).ids)
    expected = until_stop(text, stops)
    assert "".join(pieces) == expected
    assert all(token.offset < max(1, len(expected)) for token in told)


def test_bytes_that_are_no_character_are_told_in_the_end() -> None:
    broken = TOKENIZER.encode("é").ids[:1]
    pieces, told = pieces_of(transcript(), [*TOKENIZER.encode("a").ids, *broken])
    assert pieces == ["a", "", "\ufffd"]
    assert len(told) == 2


def test_endless_bytes_that_are_no_character_do_not_pile_up() -> None:
    decoder = TextDecoder(decode)
    broken = TOKENIZER.encode("é").ids[0]
    text = "".join(decoder.push(broken) for _ in range(1000)) + decoder.flush()
    assert text == "\ufffd" * 1000
    assert len(decoder._window) < 100


def test_a_text_may_end_with_the_beginning_of_a_stop_string() -> None:
    pieces, _ = pieces_of(transcript("abc"), TOKENIZER.encode("xxab").ids)
    assert pieces == ["x", "x", "", "", "ab"]


def test_the_end_of_the_sequence_is_no_part_of_the_text() -> None:
    tokens = TOKENIZER.encode("abc").ids
    made = transcript(eos=frozenset(tokens[2:]))
    pieces, told = pieces_of(made, tokens)
    assert "".join(pieces) == "ab"
    assert [token.token for token in told] == tokens[:2]
    assert made.tokens == tokens


def test_the_space_before_the_first_word_is_kept_where_the_decoder_drops_it() -> None:
    words = {"▁The": 0, "▁cat": 1, "▁sat": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="▁The"))
    tokenizer.decoder = decoders.Metaspace()
    decoder = TextDecoder(tokenizer.decode, context=[0])
    assert [decoder.push(1), decoder.push(2)] == [" cat", " sat"]


def test_however_tokens_are_grouped_the_text_is_the_same() -> None:
    random = Random(1)
    tokens = [random.randrange(256) for _ in range(300)]
    alone, _ = pieces_of(transcript("ab"), tokens)
    made, grouped = transcript("ab"), ""
    while tokens:
        size = random.randint(1, 20)
        group, tokens = tokens[:size], tokens[size:]
        grouped += made.push(group, [0.0] * len(group), []).text
    assert grouped + made.end().text == "".join(alone)


def test_a_model_without_a_tokenizer_file_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"tokenizer\.json"):
        ModelText.load({"config.json": "{}"})
