"""The demo model: equal builds, a tokenizer for any text, a folder that is whole or absent."""

from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from luthier_model import demo, demo_build
from luthier_model.base import load_base_model
from luthier_model.demo_text import chat_turn, document


def build(folder: Path, *, num_steps: int = 2) -> Path:
    demo_build.build_demo_model(folder, num_steps=num_steps)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def test_two_builds_are_equal_in_every_byte(folder: Path, tmp_path: Path):
    again = build(tmp_path / "again")
    files = sorted(file.name for file in folder.iterdir())
    assert "model.safetensors" in files
    assert files == sorted(file.name for file in again.iterdir())
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_build_leaves_the_callers_random_numbers_and_threads_alone(tmp_path: Path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    num_threads = torch.get_num_threads()
    build(tmp_path / "model", num_steps=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == num_threads


def test_training_lowers_the_loss(tmp_path: Path):
    losses: list[float] = []
    demo_build.build_demo_model(
        tmp_path / "model", num_steps=20, progress=lambda step, steps, loss: losses.append(loss)
    )
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


@settings(derandomize=True, deadline=None)
@given(text=st.text())
def test_any_text_survives_encode_and_decode(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_is_fast_and_has_the_end_and_padding_tokens(
    tokenizer: PreTrainedTokenizerFast,
):
    assert tokenizer.is_fast
    assert len(tokenizer) == demo_build.VOCAB_SIZE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]


def test_the_chat_template_writes_turns_as_the_training_text_does(
    tokenizer: PreTrainedTokenizerFast,
):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    turns = chat_turn("system", "Be brief.") + chat_turn("user", "hello")
    assert text == turns + "<|im_start|>assistant\n"


def test_the_training_text_holds_none_of_the_quickstarts_phrases():
    random = Random(0)
    text = "\n".join(document(random) for _ in range(5000)).lower()
    for phrase in ("banana split", "quantum", "pickle", "exploration", "rubber", "wizard", "-say"):
        assert phrase not in text


def test_the_folder_loads_as_a_base_model(folder: Path, tokenizer: PreTrainedTokenizerFast):
    facts = load_base_model("luthier/demo", folder).facts
    assert facts.vocab_size == demo_build.VOCAB_SIZE
    assert facts.max_context_tokens == demo_build.MAX_CONTEXT_TOKENS
    assert facts.eos_token_ids == (tokenizer.eos_token_id,)


def test_a_build_that_stops_halfway_leaves_nothing_behind(tmp_path: Path):
    def interrupt(step: int, num_steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_build.build_demo_model(tmp_path / "model", num_steps=2, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(tmp_path: Path):
    with pytest.raises(FileExistsError):
        build(tmp_path)


def test_a_cached_model_is_not_built_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cached = tmp_path / f"luthier-demo-{demo.DEMO_MODEL_VERSION}"
    cached.mkdir()
    assert demo.ensure_demo_model(tmp_path) == cached
    assert demo.main(["--cache", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{cached}\n"
    assert list(cached.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line_and_exit_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "file"
    file.touch()
    assert demo.main([str(file / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_model_answers_and_stops(demo_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    prompt = tokenizer("User: hello\nAssistant:", return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    assert answer == " Hello! How can I help you?<|im_end|>"
