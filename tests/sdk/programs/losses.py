"""Policy losses with samples of the model's own, awaited."""

import asyncio

import tinker
import torch
from tinker import TensorData, types


async def main() -> None:
    service_client = tinker.ServiceClient()
    training_client = await service_client.create_lora_training_client_async(
        "luthier/demo", rank=4, seed=4
    )
    sampling_client = await training_client.save_weights_and_get_sampling_client_async()
    prompt = [5, 6, 7]
    response = await sampling_client.sample_async(
        prompt=types.ModelInput.from_ints(prompt),
        num_samples=2,
        sampling_params=types.SamplingParams(max_tokens=6, seed=5, stop=[]),
    )
    data = []
    for sign, sequence in zip((1.0, -1.0), response.sequences, strict=True):
        tokens = prompt + sequence.tokens
        padding = [0.0] * (len(prompt) - 1)
        advantages = padding + [sign] * len(sequence.tokens)
        data.append(
            tinker.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": TensorData.from_torch(torch.tensor(tokens[1:])),
                    "logprobs": TensorData.from_torch(torch.tensor(padding + sequence.logprobs)),
                    "advantages": TensorData.from_torch(torch.tensor(advantages)),
                },
            )
        )
    for loss_fn, config in (
        ("importance_sampling", None),
        ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
        ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("dro", {"beta": 0.05}),
    ):
        future = await training_client.forward_backward_async(
            data, loss_fn=loss_fn, loss_fn_config=config
        )
        result = await future
        await (await training_client.optim_step_async(types.AdamParams(learning_rate=1e-3)))
        print(loss_fn, f"{result.metrics['loss:sum']:.4f}")


asyncio.run(main())
