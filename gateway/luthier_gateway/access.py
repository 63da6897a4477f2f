"""Which scope a key needs for which call. A route without a rule stops the start.

Scopes say what a key may do inside its own organisation; whose a thing is, is decided where it is
looked up.
"""

from collections.abc import Iterable

from aiohttp import web
from aiohttp.typedefs import Handler

from luthier_core.caller import Caller
from luthier_core.errors import OutOfScope
from luthier_gateway import (
    admin,
    checkpoints,
    forward_backward,
    futures,
    health,
    moves,
    openapi,
    queues,
    rest,
    sampling,
    sessions,
    training,
    uploads,
    usage,
)
from luthier_gateway.openai import handlers as openai

ANY: frozenset[str] = frozenset()
"""Every key that is valid."""
READ = frozenset({"read"})
TRAIN = frozenset({"train"})
SAMPLE = frozenset({"sample"})
WORK = TRAIN | SAMPLE
LOOK = READ | WORK
ADMIN = frozenset({"admin", "operator"})
OPERATOR = frozenset({"operator"})

NEEDS_ONE_OF: dict[Handler, frozenset[str]] = {
    health.health: ANY,
    openapi.get_openapi: ANY,
    sessions.client_config: ANY,
    sessions.dynamic_config: ANY,
    sessions.telemetry: ANY,
    sessions.get_server_capabilities: ANY,
    rest.get_own_key: ANY,
    rest.revoke_own_key: ANY,
    rest.refuse_key_exchange: ANY,
    sessions.create_session: WORK,
    sessions.session_heartbeat: WORK,
    sessions.finish_session: WORK,
    training.create_model: TRAIN,
    training.optim_step: TRAIN,
    training.save_weights: TRAIN,
    training.save_weights_for_sampler: TRAIN,
    training.save_weights_external: TRAIN,
    training.load_weights: TRAIN,
    training.create_custom_loss: TRAIN,
    forward_backward.forward_backward: TRAIN,
    forward_backward.forward: TRAIN,
    training.get_info: LOOK,
    sampling.create_sampling_session: SAMPLE,
    sampling.join_sampling_session: SAMPLE,
    sampling.asample: SAMPLE,
    openai.list_models: LOOK,
    openai.get_model: LOOK,
    openai.completions: SAMPLE,
    openai.chat_completions: SAMPLE,
    futures.retrieve_future: WORK,
    futures.retrieve_futures: WORK,
    futures.cancel_future: WORK,
    futures.future_status: LOOK,
    checkpoints.weights_info: LOOK,
    rest.get_sampler: LOOK,
    rest.list_training_runs: READ,
    rest.get_training_run: READ,
    checkpoints.list_run_checkpoints: READ,
    checkpoints.list_checkpoints: READ,
    checkpoints.get_checkpoint_archive: READ,
    checkpoints.get_external_weights_urls: READ,
    rest.list_sessions: READ,
    rest.search_sessions: READ,
    rest.get_session: READ,
    rest.export_trace: READ,
    rest.get_audit: READ | ADMIN,
    usage.usage_events: READ | ADMIN,
    usage.stored_checkpoints: READ | ADMIN,
    usage.run_metrics: READ,
    checkpoints.copy_weights: TRAIN,
    uploads.create_upload: TRAIN,
    uploads.put_upload: TRAIN,
    checkpoints.delete_checkpoint: TRAIN,
    checkpoints.publish_checkpoint: TRAIN,
    checkpoints.unpublish_checkpoint: TRAIN,
    checkpoints.set_checkpoint_ttl: TRAIN,
    checkpoints.get_keep_last: READ,
    checkpoints.set_keep_last: TRAIN,
    rest.set_session_project: WORK,
    admin.list_orgs: OPERATOR,
    admin.create_org: OPERATOR,
    admin.update_org: OPERATOR,
    admin.get_org: ADMIN,
    admin.list_projects: ADMIN,
    admin.create_project: ADMIN,
    admin.list_users: ADMIN,
    admin.create_user: ADMIN,
    admin.delete_user: ADMIN,
    admin.list_keys: ADMIN,
    admin.create_key: ADMIN,
    admin.revoke_key: ADMIN,
    admin.check_audit: ADMIN,
    usage.org_usage: ADMIN,
    queues.list_queues: ADMIN,
    queues.session_queue: LOOK,
    queues.cancel_queued: TRAIN,
    moves.move_run: OPERATOR,
    moves.drain: OPERATOR,
    moves.undrain: OPERATOR,
    usage.list_jobs: OPERATOR,
    usage.run_job: OPERATOR,
}


def check_rules(routes: Iterable[web.RouteDef]) -> None:
    """KeyError naming the first route whose handler has no rule."""
    for route in routes:
        if route.handler not in NEEDS_ONE_OF:
            raise KeyError(f"{route.method} {route.path}: a new route needs a rule in access.py")


def check(request: web.Request, caller: Caller) -> None:
    """OutOfScope unless the caller's key may make this call at all; what is no route passes."""
    wanted = NEEDS_ONE_OF.get(request.match_info.handler, ANY)
    if wanted and not wanted & caller.scopes:
        names = " or ".join(sorted(wanted))
        raise OutOfScope(f"{request.method} {request.path[:200]} needs scope {names}")
