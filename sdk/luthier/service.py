"""ServiceClient: the entry point; a session on a server, and what is made in it."""

import asyncio
from collections.abc import Mapping
from typing import Any, Self

from luthier import _loop, types
from luthier._loop import operation, value_of, waited
from luthier.future import APIFuture
from luthier.polling import retrieve
from luthier.rest import RestClient
from luthier.run_requests import json_request, request_type
from luthier.sampling import SamplerIds, SamplingClient
from luthier.session import FinishReason, Session, reason_of
from luthier.settings import read_settings
from luthier.training import RunIds, TrainingClient


class ServiceClient:
    """A connection to a server, and one session on it, made when something first needs it.

    base_url: else TINKER_BASE_URL, else http://127.0.0.1:8080. api_key: else TINKER_API_KEY.
    user_metadata, display_name: for finding the session later. Use it in a `with` block, or call
    close(): that ends the session, and what the server holds for it. A program that ends without
    does it too; one that is killed is noticed by its missing heartbeats.
    """

    def __init__(
        self,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        *,
        display_name: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
    ) -> None:
        self._session = Session(
            read_settings(base_url, api_key, default_headers_overrides, project_id),
            user_metadata=user_metadata,
            display_name=display_name,
        )

    # --- training clients -------------------------------------------------------------------------

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """A new training run. The client may be used at once; .result() and the async form wait
        until the run is there, and raise what prevents it, such as an unknown base_model."""
        lora = types.LoraConfig(
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
        )
        return self._training(
            "create_model",
            base_model=base_model,
            lora_config=lora.model_dump(exclude_none=True),
            user_metadata=user_metadata,
            optimizer_config=(optimizer or types.AdamOptimizerConfig()).model_dump(),
        )

    create_lora_training_client_async = value_of(create_lora_training_client)

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """A new run from the weights of a saved state, with a new optimizer."""
        return self._training(
            "load_weights",
            path=path,
            optimizer=False,
            base_model=base_model,
            user_metadata=user_metadata,
            weights_access_token=weights_access_token,
            optimizer_config=None if optimizer is None else optimizer.model_dump(),
        )

    create_training_client_from_state_async = value_of(create_training_client_from_state)

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """A new run that goes on exactly where the saved state was."""
        return self._training(
            "load_weights",
            path=path,
            optimizer=True,
            base_model=base_model,
            user_metadata=user_metadata,
            weights_access_token=weights_access_token,
        )

    create_training_client_from_state_with_optimizer_async = value_of(
        create_training_client_from_state_with_optimizer
    )

    def _training(self, endpoint: str, **fields: Any) -> TrainingClient:
        return TrainingClient(self._session, self._session.start(self._open_run(endpoint, fields)))

    async def _open_run(self, endpoint: str, fields: dict[str, Any]) -> RunIds:
        transport, session_id = self._session.transport, await self._session.id()
        seq = next(self._session.model_seqs)
        request = json_request(endpoint, **fields, session_id=session_id, model_seq_id=seq)
        accepted = await transport.call("POST", endpoint, request)
        created = await retrieve(
            transport, accepted.text_field("request_id"), request_type(endpoint)
        )
        model_id = created.json().get("model_id") or f"{session_id}:train:{seq}"
        info = await transport.call("POST", "get_info", {"model_id": model_id, "type": "get_info"})
        return RunIds(model_id, info.parsed(types.GetInfoResponse))

    # --- other clients ----------------------------------------------------------------------------

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """A client that samples from saved weights (`tinker://...`), or from a base model.

        It may be used at once; .result() and the async form wait until it is ready. ValueError
        unless exactly one of the two is given.
        """
        given = {"model_path": model_path, "base_model": base_model}
        weights = {name: value for name, value in given.items() if value is not None}
        if len(weights) != 1:
            raise ValueError("give either model_path or base_model")
        return SamplingClient(self._session, self._session.start(self._open_sampler(weights)))

    create_sampling_client_async = value_of(create_sampling_client)

    async def _open_sampler(self, weights: dict[str, str]) -> SamplerIds:
        sampler_id = await self._session.open_sampler(weights)
        answer = await self._session.transport.call("GET", f"samplers/{sampler_id}")
        told = answer.parsed(types.GetSamplerResponse)
        session_id = await self._session.id()
        return SamplerIds(session_id, sampler_id, told.base_model, told.tokenizer_id)

    def create_rest_client(self) -> RestClient:
        """A client for what the server keeps: runs, checkpoints, sessions, usage."""
        return RestClient(_session=self._session)

    def copy_weights(
        self,
        path: str,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """The path of a copy of a checkpoint, in the project of this client."""
        return self.create_rest_client().copy_weights(
            path,
            self._session.settings.project_id,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )

    @operation
    async def _capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models of the server."""
        response = await self._session.transport.call("GET", "get_server_capabilities")
        return response.parsed(types.GetServerCapabilitiesResponse)

    get_server_capabilities = waited(_capabilities)
    get_server_capabilities_async = value_of(_capabilities)

    # --- the end ----------------------------------------------------------------------------------

    def close(self, status: FinishReason = "success", detail: str | None = None) -> APIFuture[None]:
        """Ends the session; the first status is kept. Results that have not come are given up."""
        return _loop.start(self._session.close(status, detail))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(*reason_of(error)).result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # shield: a cancelled program still tells the server why it ends.
        await asyncio.shield(self.close(*reason_of(error)).coroutine())
