"""The quickstart: list models, prepare data, train, sample, look at log probabilities."""

import numpy as np
import tinker
from tinker import types

service_client = tinker.ServiceClient()
for item in service_client.get_server_capabilities().supported_models:
    print("model", item.model_name)

training_client = service_client.create_lora_training_client(
    base_model="luthier/demo", rank=16, seed=7
)
tokenizer = training_client.get_tokenizer()
examples = [("banana split", "anana-bay plit-say"), ("donut shop", "onut-day op-shay")]


def process_example(source: str, result: str) -> types.Datum:
    prompt_tokens = tokenizer.encode(f"English: {source}\nPig Latin:", add_special_tokens=True)
    answer_tokens = tokenizer.encode(f" {result}\n\n", add_special_tokens=False)
    tokens = prompt_tokens + answer_tokens
    weights = [0] * len(prompt_tokens) + [1] * len(answer_tokens)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
        loss_fn_inputs={"weights": weights[1:], "target_tokens": tokens[1:]},
    )


processed = [process_example(*example) for example in examples]
first = processed[0]
rows = zip(
    first.model_input.to_ints(),
    first.loss_fn_inputs["target_tokens"].tolist(),
    first.loss_fn_inputs["weights"].tolist(),
    strict=True,
)
for inp, tgt, wgt in rows:
    print(f"{tokenizer.decode([inp])!r:<20} {tokenizer.decode([tgt])!r:<20} {wgt:<10}")

for _ in range(6):
    fwdbwd_future = training_client.forward_backward(processed, "cross_entropy")
    optim_future = training_client.optim_step(types.AdamParams(learning_rate=1e-3))
    fwdbwd_result = fwdbwd_future.result()
    optim_future.result()
    logprobs = np.concatenate([o["logprobs"].tolist() for o in fwdbwd_result.loss_fn_outputs])
    weights = np.concatenate([d.loss_fn_inputs["weights"].tolist() for d in processed])
    print(f"loss per token {-np.dot(logprobs, weights) / weights.sum():.6f}")

sampling_client = training_client.save_weights_and_get_sampling_client()
prompt = types.ModelInput.from_ints(tokenizer.encode("English: coffee break\nPig Latin:"))
params = types.SamplingParams(max_tokens=12, temperature=0.0, stop=["\n"])
result = sampling_client.sample(prompt=prompt, sampling_params=params, num_samples=2).result()
for i, seq in enumerate(result.sequences):
    print(i, repr(tokenizer.decode(seq.tokens)), seq.stop_reason)

response = sampling_client.sample(
    prompt=prompt,
    num_samples=1,
    sampling_params=tinker.SamplingParams(max_tokens=1),
    include_prompt_logprobs=True,
    topk_prompt_logprobs=3,
).result()
print([value and round(value, 4) for value in response.prompt_logprobs])
print([row and [token for token, _ in row] for row in response.topk_prompt_logprobs])
