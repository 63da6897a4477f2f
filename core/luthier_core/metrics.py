"""Every metric of every part, with its unit: what `/metrics` on the ops port says.

A name begins with its part: `luthier_gateway_`, `luthier_trainer_`, ... and a part exposes its own
only (ops_server.py), with the base model that it works for as a label where it works for one. Ids
of tenants, keys and models are labels; nothing of what users send is.
"""

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
NATS = (1e-6, 1e-5, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)

# --- gateway --------------------------------------------------------------------------------------

REQUESTS = Counter(
    "luthier_gateway_requests_total", "Requests answered.", ["method", "route", "status"]
)
REQUEST_SECONDS = Histogram(
    "luthier_gateway_request_seconds",
    "From a request's headers to its answer; a long poll is as long as what it waits for.",
    ["route"],
    buckets=SECONDS,
)
TOO_MANY_REQUESTS = Counter(
    "luthier_gateway_too_many_requests_total", "Answers with status 429.", ["tenant"]
)
OPEN_POLLS = Gauge("luthier_gateway_open_polls", "Requests that wait for a result.")
GENERATION_MISMATCH = Gauge(
    "luthier_gateway_generation_mismatch",
    "1 while Redis is not the one that the object store knows: nothing is taken.",
)
FOREIGN_IDS = Counter(
    "luthier_gateway_foreign_ids_total",
    "Requests for a run of another tenant, by the key that sent them.",
    ["key_id"],
)
CHANGED_OUTCOMES = Counter(
    "luthier_gateway_changed_outcomes_total",
    "Results that were delivered again and were not the same. Never happens.",
)

# --- trainer --------------------------------------------------------------------------------------

CYCLE_SECONDS = Histogram(
    "luthier_trainer_cycle_seconds", "One clock cycle: its ops, executed.", buckets=SECONDS
)
EFFECT_SECONDS = Histogram(
    "luthier_trainer_effect_seconds",
    "Steps of a run's life: execute, finish (upload), commit, copystate, putsnapshot, restore, ...",
    ["effect"],
    buckets=SECONDS,
)
TRAINED_TOKENS = Counter("luthier_trainer_tokens_total", "Tokens put through the model.", ["kind"])
REQUEST_TOKENS = Histogram(
    "luthier_trainer_request_tokens", "Tokens of one forward or forward_backward.", buckets=TOKENS
)
LOGPROB_GAP = Histogram(
    "luthier_trainer_logprob_gap_nats",
    "Root mean square, to second order, of the logprobs that came with data for a policy loss less "
    "the trainer's: rounding, and how far the policy has moved since it sampled.",
    buckets=NATS,
)
OWNED_RUNS = Gauge("luthier_trainer_owned_runs", "Runs whose state this trainer holds.")
SNAPSHOT_AGE_SECONDS = Gauge(
    "luthier_trainer_snapshot_age_seconds",
    "The oldest op of any run here that no stored snapshot has.",
)
RECOVERIES = Counter("luthier_trainer_recoveries_total", "Runs taken over and rebuilt.")
RECOVERY_SECONDS = Histogram(
    "luthier_trainer_recovery_seconds",
    "From the decision to take a run over to its first new op.",
    buckets=SECONDS,
)
REPLAYED_OPS = Counter("luthier_trainer_replayed_ops_total", "Ops executed again in a recovery.")
APPROXIMATE_RECOVERIES = Counter(
    "luthier_trainer_approximate_recoveries_total",
    "Runs of fused execution that came back with other bits: see `recovered` of the run.",
)
REPLAY_MISMATCHES = Counter(
    "luthier_trainer_replay_mismatches_total", "Replays that left another state than before."
)
FENCED = Counter(
    "luthier_trainer_fenced_total",
    "Writes refused because another worker holds the run.",
    ["effect"],
)
OUT_OF_ORDER = Counter(
    "luthier_trainer_out_of_order_total",
    "Writes refused because they do not follow what is committed: Redis has gone back.",
    ["effect"],
)
for _effect in ("acquire", "begin", "commit", "fastforward", "failrange", "trim"):
    # What first appears with a 1 has not increased, as Prometheus sees it: it starts with a 0.
    FENCED.labels(_effect)
    OUT_OF_ORDER.labels(_effect)
HEAD_CONFLICTS = Counter(
    "luthier_trainer_head_conflicts_total", "HEADs that another worker had changed."
)
QUARANTINES = Counter(
    "luthier_trainer_quarantined_ops_total", "Ops failed because the engine died of them."
)
GAPS_GIVEN_UP = Counter(
    "luthier_trainer_gaps_given_up_total", "Gaps in a run's seqs that were not filled in time."
)
ENGINE_DEATHS = Counter("luthier_trainer_engine_deaths_total", "Engine processes that died.")

# --- sampler --------------------------------------------------------------------------------------

SAMPLER_SEQUENCES = Gauge(
    "luthier_sampler_sequences", "Sequences in the engine, by state: running or waiting.", ["state"]
)
SAMPLER_MAX_RUNNING = Gauge(
    "luthier_sampler_max_running", "sampler.max_running: how many may share a step."
)
KV_BLOCKS = Gauge("luthier_sampler_kv_blocks", "Blocks of the KV cache, by state.", ["state"])
LOADED_ADAPTERS = Gauge("luthier_sampler_adapters", "Adapters on the device.")
STEPS = Counter("luthier_sampler_steps_total", "Batches computed.")
PREEMPTIONS = Counter("luthier_sampler_preemptions_total", "Sequences that had to give way.")
COMPUTED_TOKENS = Counter(
    "luthier_sampler_computed_tokens_total", "Tokens put through the model, prompts included."
)
SAMPLED_TOKENS = Counter("luthier_sampler_sampled_tokens_total", "Tokens drawn.")
PROMPT_TOKENS = Counter("luthier_sampler_prompt_tokens_total", "Prompt tokens of ended requests.")
CACHED_TOKENS = Counter(
    "luthier_sampler_cached_tokens_total", "Those of them that came from the prefix cache."
)
SAMPLES = Counter("luthier_sampler_requests_total", "Requests that ended.", ["outcome"])

# --- registry: what Redis holds -------------------------------------------------------------------

QUEUE_DEPTH = Gauge(
    "luthier_registry_queue_depth",
    "Ops (kind=train) and sampling requests (kind=sample) that wait or run.",
    ["base_model", "tenant", "kind"],
)
QUEUE_AGE_SECONDS = Gauge(
    "luthier_registry_queue_age_seconds",
    "Age of the oldest of them.",
    ["base_model", "tenant", "kind"],
)
LIVE_RUNS = Gauge(
    "luthier_registry_live_runs", "Runs that have or may need an owner.", ["base_model"]
)
LOG_OPS_MAX = Gauge(
    "luthier_registry_log_ops_max", "Ops in the longest log, done ones included.", ["base_model"]
)
LIVE_WORKERS = Gauge(
    "luthier_registry_live_workers", "Workers with a lease.", ["base_model", "role", "state"]
)
REDIS_MEMORY_BYTES = Gauge("luthier_registry_redis_memory_bytes", "What Redis uses.")
REDIS_MEMORY_LIMIT_BYTES = Gauge(
    "luthier_registry_redis_memory_limit_bytes", "maxmemory; the machine's memory without one."
)
JOB_AGE_SECONDS = Gauge(
    "luthier_registry_job_age_seconds", "Since a housekeeping job has run without error.", ["task"]
)
JOB_RESULT = Gauge(
    "luthier_registry_job_result", "What its last run has counted.", ["task", "what"]
)
