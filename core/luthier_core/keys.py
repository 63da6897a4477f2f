"""Every Redis key, channel and object path, as functions. Reliability 2.1 and 1.3 name them.

A hash tag in braces keeps all keys of one run, or of one shard of sampling sessions, in one slot.
"""

from hashlib import sha256

# --- Redis: training runs -------------------------------------------------------------------------


def run_header(run_id: str) -> str:
    """Hash: tenant, facts, status, epoch, owner, admitted, committed, pending bytes, told."""
    return f"{{{run_id}}}:h"


def run_log(run_id: str) -> str:
    """Stream of admitted ops; entry id `seq-0` (op 0: `0-1`)."""
    return f"{{{run_id}}}:log"


def run_parked(run_id: str) -> str:
    """Hash seq -> entry of the ops above a gap."""
    return f"{{{run_id}}}:park"


def run_outcome(run_id: str, seq: int | str) -> str:
    """Hash with a TTL: the outcome of one op."""
    return f"{{{run_id}}}:r:{seq}"


def run_done(run_id: str) -> str:
    """Sharded pub/sub channel that carries the seq of each committed op: hints to long polls."""
    return f"{{{run_id}}}:done"


def run_new(run_id: str) -> str:
    """Sharded pub/sub channel that carries the seq of each admitted op: hints to the owner."""
    return f"{{{run_id}}}:new"


def run_of_new(channel: str) -> str:
    """The run id in the name of a run_new channel."""
    return channel[1 : channel.rindex("}")]


def clock_cycles(base_model: str) -> str:
    """Counter: clock cycles set aside by the trainers of one base model."""
    return f"cycles:{base_model}"


# --- Redis: sampling ------------------------------------------------------------------------------

SAMPLING_GROUP = "samplers"
NUM_SAMPLING_SHARDS = 1


def sampling_shard(sampling_session_id: str) -> str:
    """The hash tag of a sampling session: its dedupe record, job and outcome are one slot."""
    from zlib import crc32

    return f"{{s{crc32(sampling_session_id.encode()) % NUM_SAMPLING_SHARDS}}}"


def sampling_jobs(base_model: str, shard: str = "{s0}") -> str:
    """Stream with the group `samplers`: sampling jobs of one base model."""
    return f"{shard}:q:{base_model}"


def sampling_header(sampling_session_id: str) -> str:
    """Hash: tenant, base model and weights of one sampling session."""
    return f"{sampling_shard(sampling_session_id)}:h:{sampling_session_id}"


def sampling_outcome(sampling_session_id: str, seq: int | str) -> str:
    """Hash with a TTL: digest of the request, then state and outcome."""
    return f"{sampling_shard(sampling_session_id)}:r:{sampling_session_id}:{seq}"


def sampling_join(sampling_session_id: str, idempotency_key: str) -> str:
    """The number that the handle which joined under this idempotency key was given."""
    name = sha256(idempotency_key.encode()).hexdigest()[:32]
    return f"{sampling_shard(sampling_session_id)}:join:{sampling_session_id}:{name}"


def sampling_done(sampling_session_id: str) -> str:
    """Sharded pub/sub channel that carries the seq of each finished sample: a hint."""
    return f"{sampling_shard(sampling_session_id)}:done:{sampling_session_id}"


def sampling_completions(sampling_session_id: str, clone: int) -> str:
    """Stream of finished samples of one clone of a sampling session; entry ids `{position}-0`."""
    return f"{sampling_shard(sampling_session_id)}:completed:{sampling_session_id}:{clone}"


def sampling_cancelled(base_model: str, shard: str = "{s0}") -> str:
    """Sharded pub/sub channel that carries request ids of cancelled samples: hints to samplers."""
    return f"{shard}:cancel:{base_model}"


def sampling_published(base_model: str) -> str:
    """Sharded pub/sub channel that carries runs whose in-flight weights have moved: hints."""
    return f"{{s0}}:published:{base_model}"


def sampling_partials(request_id: str) -> str:
    """Sharded pub/sub channel that carries the tokens of one running sample so far: hints."""
    session = request_id.rpartition(":")[0]
    return f"{sampling_shard(session)}:part:{request_id}"


def sampling_usage(shard: str = "{s0}") -> str:
    """Stream of what finished samples have used, until it is counted."""
    return f"{shard}:usage"


# --- Redis: workers and sessions ------------------------------------------------------------------


def session_header(session_id: str) -> str:
    """Hash: tenant, status (active or finished and how), last heartbeat."""
    return f"{{{session_id}}}:h"


def worker_lease(worker: str) -> str:
    """JSON with an expiry: incarnation, role, base model, state of one live worker."""
    return f"w:{worker}"


WORKERS = "workers"
"""Set of the names of all workers there have been; their leases say which are alive."""


def live_runs(base_model: str) -> str:
    """Sorted set, by time, of the runs of one base model that have or may need an owner."""
    return f"runs:{base_model}"


def model_wake(base_model: str) -> str:
    """Sharded pub/sub channel that carries run ids without an owner: hints to all its workers."""
    return f"wake:{base_model}"


def run_moves(base_model: str) -> str:
    """Hash run -> the trainer that is to have it; see moves.py."""
    return f"moves:{base_model}"


def drained_trainers(base_model: str) -> str:
    """Set of the names of trainers that are to have no runs."""
    return f"drained:{base_model}"


def model_facts(base_model: str) -> str:
    """JSON facts of a base model, from its workers: what requests are checked against."""
    return f"model:{base_model}"


CHANGING = "changing"
"""Hash: changes of checkpoints that are under way, or that died; see the registry's lists.py."""

GENERATION = "sys:gen"
"""Which Redis this is; see generation.py."""
LISTED_SINCE = "sys:listed"
"""The server process under which the lists were last compared with the object store."""
GENERATION_OBJECT = "sys/gen"

# --- Redis: indexes for listing (rebuildable from the bucket) -------------------------------------


def index_order(tenant: str, what: str) -> str:
    """Sorted set of ids by time; what: runs, sessions, checkpoints, samplers:<session>, ..."""
    return f"{{t:{tenant}}}:ix:{what}"


def index_rows(tenant: str, what: str) -> str:
    """Hash id -> JSON list row, beside index_order."""
    return f"{{t:{tenant}}}:row:{what}"


def metrics_cursor(tenant: str) -> str:
    """Hash run id -> highest seq whose metrics are in the history and counted as usage."""
    return f"{{t:{tenant}}}:metrics"


def samples_cursor(tenant: str) -> str:
    """Hash shard -> the last entry of its usage stream that is counted for this tenant."""
    return f"{{t:{tenant}}}:samples"


def usage(tenant: str, period: str) -> str:
    """Hash `run or sampling session|kind|base model` -> amount; period: an hour, 2026010203."""
    return f"{{t:{tenant}}}:usage:{period}"


def used(tenant: str, period: str) -> str:
    """Hash `key id|kind|base model` -> amount; period: a day, 20260102, or a month, 202601."""
    return f"{{t:{tenant}}}:used:{period}"


def stored(tenant: str) -> str:
    """Hash key id -> bytes of its checkpoints; `at`: when that was, `total`: of all keys."""
    return f"{{t:{tenant}}}:stored"


COUNTED_RUNS = "usage:runs"
"""Set of the runs whose latest ops may not be counted yet."""


def audit_head(tenant: str) -> str:
    """`number sha256` of the last audit entry: what a cut at the chain's end is noticed by."""
    return f"{{t:{tenant}}}:audit"


# --- object store ---------------------------------------------------------------------------------


def tenant_prefix(tenant: str) -> str:
    return f"t/{tenant}/"


def run_prefix(tenant: str, run_id: str) -> str:
    return f"t/{tenant}/runs/{run_id}/"


def run_record(tenant: str, run_id: str) -> str:
    """Facts of a run, create-if-absent by the registry before op 0."""
    return f"{run_prefix(tenant, run_id)}run.json"


def run_head(tenant: str, run_id: str) -> str:
    """HEAD of a run (compare-and-swap): epoch, owner and snapshots; the durable fence."""
    return f"{run_prefix(tenant, run_id)}HEAD.json"


def op_payload(tenant: str, run_id: str, seq: int, digest: str) -> str:
    """Body of an op above the inline limit (claim check)."""
    return f"{run_prefix(tenant, run_id)}ops/{seq:010}-{digest[:12]}"


def op_result(tenant: str, run_id: str, seq: int, epoch: int) -> str:
    """Outcome above the inline limit."""
    return f"{run_prefix(tenant, run_id)}res/{seq}-{epoch}"


def snapshot_prefix(tenant: str, run_id: str, seq: int, epoch: int) -> str:
    """The whole state of a run after op seq, stored under this epoch."""
    return f"{run_prefix(tenant, run_id)}snap/{seq}-{epoch}/"


def checkpoint_prefix(tenant: str, run_id: str, seq: int, epoch: int) -> str:
    """Files that op seq saved under this epoch."""
    return f"{run_prefix(tenant, run_id)}ckpt/{seq}-{epoch}/"


def checkpoint_manifest(tenant: str, run_id: str, seq: int) -> str:
    """Which files are op seq's checkpoint; create-if-absent, written after every file."""
    return f"{run_prefix(tenant, run_id)}man/{seq}"


def run_recoveries(tenant: str, run_id: str) -> str:
    """Prefix of the events of a run's history."""
    return f"{run_prefix(tenant, run_id)}recovered/"


def run_recovery(tenant: str, run_id: str, epoch: int) -> str:
    """How the run was rebuilt by its owner under this epoch; create-if-absent."""
    return f"{run_recoveries(tenant, run_id)}{epoch:010}.json"


def name_record(tenant: str, run_id: str, kind: str, name: str) -> str:
    """The checkpoint's record (compare-and-swap); kind: weights, sampler_weights, ephemeral, ..."""
    return f"t/{tenant}/names/{run_id}/{kind}/{name}.json"


def published_run(run_id: str) -> str:
    """Whose run this is, once a checkpoint of it has been published; immutable."""
    return f"published/{run_id}.json"


def upload_record(tenant: str, upload_id: str) -> str:
    """What somebody is about to upload; its files lie where the run's checkpoint 0 has them."""
    return f"t/{tenant}/uploads/{upload_id}.json"


def retention(tenant: str, run_id: str) -> str:
    """How many checkpoints of a run are kept, where its owner has said so."""
    return f"t/{tenant}/retention/{run_id}.json"


def archive(tenant: str, manifest_digest: str) -> str:
    """Tar of a checkpoint's PEFT files: made on demand, and again if it is gone."""
    return f"t/{tenant}/archives/{manifest_digest}.tar"


def session_record(tenant: str, session_id: str) -> str:
    return f"t/{tenant}/sessions/{session_id}.json"


def sampler_record(tenant: str, sampling_session_id: str) -> str:
    return f"t/{tenant}/samplers/{sampling_session_id}.json"


def sample_payload(tenant: str, sampling_session_id: str, seq: int | str, digest: str) -> str:
    """Sampling request above the inline limit."""
    return f"t/{tenant}/samples/{sampling_session_id}/{seq}-{digest[:12]}"


def sample_result(tenant: str, sampling_session_id: str, seq: int | str) -> str:
    """Sampling outcome above the inline limit."""
    return f"t/{tenant}/samples/{sampling_session_id}/{seq}.res"


def sample_histories(tenant: str, sampling_session_id: str) -> str:
    """Prefix of the objects that tell of every sample that a sampling session has finished."""
    return f"t/{tenant}/samples/{sampling_session_id}/history/"


def sample_history(tenant: str, sampling_session_id: str, first_entry: str) -> str:
    """What of a samples_segment is of this sampling session."""
    return f"{sample_histories(tenant, sampling_session_id)}{first_entry}.json"


def session_trace(tenant: str, session_id: str, hour: str) -> str:
    """The timeline of a session, as it was when somebody asked last in this hour."""
    return f"t/{tenant}/archives/{session_id}-{hour}.pftrace"


def api_key_record(key_hmac: str) -> str:
    """Tenant and scopes of one API key, named by the HMAC of the key under the server secret."""
    return f"keys/{key_hmac}.json"


def metrics_segment(tenant: str, run_id: str, first_seq: int) -> str:
    """Metrics of the ops from this seq on, as many as there were; immutable."""
    return f"{run_prefix(tenant, run_id)}metrics/{first_seq:010}.json"


def samples_segment(shard: str, first_entry: str) -> str:
    """What the samples from this entry of the usage stream on have used; immutable."""
    return f"usage/samples/{shard.strip('{}')}/{first_entry}.json"


def model_facts_object(base_model: str) -> str:
    """The same as model_facts, for when Redis was wiped."""
    return f"sys/models/{base_model}.json"


def model_text_object(base_model: str) -> str:
    """Its tokenizer and chat template, for gateways, which have no folder of the model."""
    return f"sys/texts/{base_model}.json"


def store_probe(name: str) -> str:
    """Written and deleted at the start of a service; see store_probe.py."""
    return f"sys/probe/{name}"


def sweep_candidates(tenant: str) -> str:
    """Objects that nothing needs, and since when that is known."""
    return f"sys/sweep/{tenant}.json"


def org_record(org_id: str) -> str:
    return f"orgs/{org_id}.json"


def project_record(tenant: str, project_id: str) -> str:
    return f"t/{tenant}/projects/{project_id}.json"


def user_record(tenant: str, user_id: str) -> str:
    return f"t/{tenant}/users/{user_id}.json"


def audit_entry(tenant: str, number: int) -> str:
    """One event, create-if-absent; numbers are dense from 0."""
    return f"t/{tenant}/audit/{number:012}.json"
