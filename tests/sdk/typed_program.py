"""A program as a careful user writes it: mypy --strict has nothing to say about it."""

from typing import assert_type

import luthier
from luthier import data, types


async def main() -> list[list[int]]:
    async with luthier.ServiceClient() as service:
        training = await service.create_lora_training_client_async("luthier/demo", rank=4)
        assert_type(training, luthier.TrainingClient)
        datum = data.datum_from_completion([5, 6, 7], [8, 9])
        gradient = await training.forward_backward_async([datum], "cross_entropy")
        assert_type(gradient, luthier.APIFuture[types.ForwardBackwardOutput])
        update = training.optim_step(types.AdamParams(learning_rate=1e-3))
        assert_type(await gradient, types.ForwardBackwardOutput)
        assert_type(await update, types.OptimStepResponse)
        assert_type(training.get_info(), types.GetInfoResponse)
        assert_type(training.save_state("end").result(timeout=60), types.SaveWeightsResponse)

        sampling = training.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=4, seed=1, stop=["\n"])
        prompt = types.ModelInput.from_ints([5, 6, 7])
        response = await sampling.sample_async(prompt, 2, params)
        assert_type(response, types.SampleResponse)
        assert_type(await sampling.compute_logprobs_async(prompt), list[float | None])

        rest = service.create_rest_client()
        assert_type(rest.get_training_run(training.model_id).result(), types.TrainingRun)
        assert_type(await rest.list_sessions_async(limit=5), types.ListSessionsResponse)
        return [sequence.tokens for sequence in response.sequences]
