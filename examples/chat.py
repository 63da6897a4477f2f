"""Chats with a base model or a checkpoint through the official `tinker` SDK.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/chat.py                                      # a conversation at the terminal
    python examples/chat.py --model tinker://.../sampler_weights/x --say "hello" --say "thank you"

An empty line or the end of the input ends it. docs/openai.md has the same for the `openai` client.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from typing import Any

import tinker
from common import first_model, run, tokenizer_of
from tinker import types


def chat(service: tinker.ServiceClient, args: Namespace) -> bool:
    """Each turn is sent with all that was said before: the sampler finds it in its prefix cache."""
    sampling = open_model(service, args.model)
    tokenizer = tokenizer_of(sampling, args.tokenizer)
    params = types.SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    messages: list[dict[str, str]] = []
    for said in turns(args.say):
        messages.append({"role": "user", "content": said})
        prompt = render(tokenizer, messages)
        answer = sampling.sample(prompt, num_samples=1, sampling_params=params).result()
        # The end of the turn is a special token.
        text = tokenizer.decode(answer.sequences[0].tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        print(f"model> {text}", flush=True)
    return True


def open_model(service: tinker.ServiceClient, model: str | None) -> tinker.SamplingClient:
    """A client of the checkpoint at a tinker:// path, or of a base model."""
    if model is not None and model.startswith("tinker://"):
        return service.create_sampling_client(model_path=model)
    return service.create_sampling_client(base_model=model or first_model())


def render(tokenizer: Any, messages: list[dict[str, str]]) -> types.ModelInput:
    """The conversation as the model's chat template writes it."""
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return types.ModelInput.from_ints(tokens)


def turns(said: list[str]) -> Iterator[str]:
    """What the user says: given on the command line, or typed."""
    if said:
        for line in said:
            print(f"you> {line}")
            yield line
        return
    while line := read_line():
        yield line


def read_line() -> str:
    try:
        return input("you> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model or tinker:// path; default: the first model")
    parser.add_argument("--tokenizer", help="folder or Hub name; default: the base model's name")
    parser.add_argument("--say", action="append", default=[], help="a turn; instead of typing it")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    run(chat, parser)
