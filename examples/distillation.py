"""Distillation: a student learns the teacher's k likeliest tokens at every position.

    export TINKER_BASE_URL=http://127.0.0.1:8080 TINKER_API_KEY=tml-...
    python examples/distillation.py

The teacher is a LoRA that this program teaches to say words twice; the student never sees an
answer, only how likely the teacher finds what. `target_tokens` and `weights` of shape [T, K] make
`cross_entropy` the one between the two distributions. Exits with 0 if the student is within a
tenth of where it began from the teacher.
"""

import math
from argparse import ArgumentParser, Namespace
from typing import Any

import numpy as np
import tinker
from common import curve, run_on_base_model
from supervised import make_datum, random_words
from tinker import types

NUM_WORDS = 12


def distil(service: tinker.ServiceClient, args: Namespace) -> bool:
    teacher = service.create_lora_training_client(args.base_model, 16, args.seed).result()
    tokenizer = teacher.get_tokenizer()
    lessons = [make_datum(word, tokenizer) for word in random_words(NUM_WORDS, args.seed)]
    adam_params = types.AdamParams(learning_rate=args.learning_rate)
    for _ in range(args.teacher_steps):
        teacher.forward_backward(lessons, "cross_entropy")
        optim_step = teacher.optim_step(adam_params)
    optim_step.result()
    data, entropy = targets_of(teacher, lessons, args.top_k)

    student = service.create_lora_training_client(args.base_model, 4, args.seed + 1).result()
    num_tokens = sum(len(datum.model_input.to_ints()) for datum in data)
    divergences = []
    for _ in range(args.steps):
        forward_backward = student.forward_backward(data, "cross_entropy")
        optim_step = student.optim_step(adam_params)
        loss = forward_backward.result().metrics["loss:sum"]
        # Cross entropy less the teacher's own entropy is the divergence of the student from it.
        divergences.append((loss - entropy) / num_tokens)
        optim_step.result()
    curve("KL to teacher", divergences)
    return divergences[-1] < divergences[0] / 10


def targets_of(
    teacher: tinker.TrainingClient, lessons: list[types.Datum], top_k: int
) -> tuple[list[types.Datum], float]:
    """The lessons with the teacher's top k at each position, and the sum of their entropies."""
    sampling = teacher.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=1)
    futures = [
        sampling.sample(lesson.model_input, 1, params, topk_prompt_logprobs=top_k)
        for lesson in lessons
    ]
    data, entropy = [], 0.0
    for lesson, future in zip(lessons, futures, strict=True):
        top = future.result().topk_prompt_logprobs
        assert top is not None
        # Entry t tells what comes at position t: the target of position t - 1. None is before 0.
        rows = [row for row in top[1:] if row is not None]
        tokens = np.array([[token for token, _ in row] for row in rows])
        likely = np.exp(np.array([[logprob for _, logprob in row] for row in rows]))
        likely /= likely.sum(axis=1, keepdims=True)  # of the k, which are nearly all
        entropy -= float((likely * np.log(likely)).sum())
        inputs: dict[str, Any] = {
            "target_tokens": types.TensorData.from_numpy(tokens),
            "weights": types.TensorData.from_numpy(likely.astype(np.float32)),
        }
        prompt = lesson.model_input.to_ints()[: len(rows)]
        data.append(types.Datum(types.ModelInput.from_ints(prompt), inputs))
    assert math.isfinite(entropy)
    return data, entropy


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-steps", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    run_on_base_model(distil, parser)
