"""Losses of one's own, over each sequence and over several."""

import asyncio

import tinker
import torch
from tinker import Datum, ModelInput, TensorData

service_client = tinker.ServiceClient()
training_client = service_client.create_lora_training_client("luthier/demo", rank=4, seed=2)


def logprob_squared_loss(
    data: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    loss = sum((values**2).sum() for values in logprobs)
    return loss, {"logprob_squared_loss": loss.item()}


def variance_loss(
    data: list[Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    variance = torch.var(torch.cat(logprobs))
    return variance, {"variance_loss": variance.item()}


data = [
    tinker.Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": TensorData.from_torch(torch.tensor(tokens[1:]))},
    )
    for tokens in ([5, 6, 7, 8], [9, 10, 11])
]
result = training_client.forward_backward_custom(data, logprob_squared_loss).result()
print(f"{result.metrics['loss:sum']:.4f} {result.metrics['logprob_squared_loss']:.4f}")


async def main() -> None:
    future = await training_client.forward_backward_custom_async(data, variance_loss)
    metrics = (await future).metrics
    print(f"{metrics['variance_loss']:.4f}")
    await (await training_client.optim_step_async(tinker.AdamParams(learning_rate=1e-3)))
    print(sorted(metrics))


asyncio.run(main())
