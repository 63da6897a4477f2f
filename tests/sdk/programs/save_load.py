"""Saving, loading, resuming, and what the server lists of it."""

import tinker
from tinker import types

service_client = tinker.ServiceClient(user_metadata={"purpose": "save and load"})
training_client = service_client.create_lora_training_client(
    base_model="luthier/demo", rank=4, seed=3
).result()
datum = types.Datum(
    model_input=types.ModelInput.from_ints([5, 6, 7]),
    loss_fn_inputs={"target_tokens": [6, 7, 8], "weights": [1.0, 1.0, 1.0]},
)
for _ in range(2):
    training_client.forward_backward([datum], "cross_entropy")
    training_client.optim_step(types.AdamParams(learning_rate=1e-3)).result()

sampling_path = training_client.save_weights_for_sampler(name="0000").result().path
sampling_client = service_client.create_sampling_client(model_path=sampling_path)
print(sampling_client.get_base_model())

resume_path = training_client.save_state(name="0010").result().path
training_client.load_state(resume_path).result()
resumed = service_client.create_training_client_from_state_with_optimizer(resume_path)
print(f"{resumed.forward([datum], 'cross_entropy').result().metrics['loss:sum']:.6f}")

rest_client = service_client.create_rest_client()
parsed = tinker.ParsedCheckpointTinkerPath.from_tinker_path(resume_path)
run = rest_client.get_training_run(parsed.training_run_id).result()
print(run.base_model, run.is_lora, run.lora_rank)
listed = rest_client.list_checkpoints(run.training_run_id).result().checkpoints
print(sorted((c.checkpoint_id, c.checkpoint_type, c.public) for c in listed))
info = rest_client.get_weights_info_by_tinker_path(resume_path).result()
print(info.base_model, info.lora_rank)
page = rest_client.list_training_runs(limit=50).result()
assert run.training_run_id in [item.training_run_id for item in page.training_runs]
assert page.cursor.total_count >= 1
assert any(
    c.tinker_path == resume_path
    for c in rest_client.list_user_checkpoints(limit=100).result().checkpoints
)
session_id = run.training_run_id.partition(":")[0]
assert session_id in rest_client.list_sessions(limit=50).result().sessions
assert run.training_run_id in rest_client.get_session(session_id).result().training_run_ids
rest_client.delete_checkpoint_from_tinker_path(sampling_path).result()
left = rest_client.list_checkpoints(run.training_run_id).result().checkpoints
print([checkpoint.checkpoint_id for checkpoint in left])
