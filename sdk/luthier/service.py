"""ServiceClient: the entry point; a session on a server, and what is made in it."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from luthier import _loop, types
from luthier._loop import operation, value_of, waited
from luthier.future import APIFuture
from luthier.polling import retrieve
from luthier.rest import RestClient
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
        """A new training run. The client may be used at once; .result() waits until the run is
        there, and raises what prevents it, such as an unknown base_model."""
        lora = types.LoraConfig(
            rank=rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
        )
        request = {
            "type": "create_model",
            "base_model": base_model,
            "lora_config": lora.model_dump(exclude_none=True),
            "user_metadata": user_metadata,
            "optimizer_config": (optimizer or types.AdamOptimizerConfig()).model_dump(),
        }
        return self._training("create_model", "CreateModel", request)

    async def create_lora_training_client_async(
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
        """Like the plain form, once the run is there."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, user_metadata, optimizer
        )

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """A new run from the weights of a saved state, with a new optimizer."""
        return self._from_state(
            path, base_model, user_metadata, weights_access_token, optimizer, with_optimizer=False
        )

    async def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Like the plain form, once the run is there."""
        return await self.create_training_client_from_state(
            path, base_model, user_metadata, weights_access_token, optimizer
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """A new run that goes on exactly where the saved state was."""
        return self._from_state(
            path, base_model, user_metadata, weights_access_token, None, with_optimizer=True
        )

    async def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Like the plain form, once the run is there."""
        return await self.create_training_client_from_state_with_optimizer(
            path, base_model, user_metadata, weights_access_token
        )

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        token: str | None,
        optimizer: types.OptimizerConfig | None,
        *,
        with_optimizer: bool,
    ) -> TrainingClient:
        request = {
            "type": "load_weights",
            "path": path,
            "optimizer": with_optimizer,
            "base_model": base_model,
            "user_metadata": user_metadata,
            "weights_access_token": token,
            "optimizer_config": None if optimizer is None else optimizer.model_dump(),
        }
        return self._training("load_weights", "LoadWeights", request)

    def _training(
        self, endpoint: str, request_type: str, request: dict[str, Any]
    ) -> TrainingClient:
        opening = self._create_run(endpoint, request_type, request)
        return TrainingClient(self._session, self._session.start(opening))

    async def _create_run(
        self, endpoint: str, request_type: str, request: dict[str, Any]
    ) -> RunIds:
        transport = self._session.transport
        numbered = {
            **request,
            "session_id": await self._session.id(),
            "model_seq_id": next(self._session.model_seqs),
        }
        given = {name: value for name, value in numbered.items() if value is not None}
        accepted = await transport.call("POST", endpoint, given)
        created = await retrieve(transport, accepted.text_field("request_id"), request_type)
        model_id = (
            created.json().get("model_id")
            or f"{numbered['session_id']}:train:{numbered['model_seq_id']}"
        )
        info = await transport.call("POST", "get_info", {"model_id": model_id, "type": "get_info"})
        return RunIds(model_id, info.parsed(types.GetInfoResponse))

    # --- other clients ----------------------------------------------------------------------------

    def create_sampling_client(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """A client that samples from saved weights (`tinker://...`), or from a base model.

        It may be used at once; .result() waits until it is ready. ValueError unless exactly one
        of the two is given.
        """
        if (model_path is None) == (base_model is None):
            raise ValueError("give either model_path or base_model")
        opening = self._open_sampler(model_path, base_model)
        return SamplingClient(self._session, self._session.start(opening))

    async def create_sampling_client_async(
        self, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """Like the plain form, once the client is ready."""
        return await self.create_sampling_client(model_path, base_model)

    async def _open_sampler(self, model_path: str | None, base_model: str | None) -> SamplerIds:
        transport = self._session.transport
        session_id = await self._session.id()
        wanted = {"model_path": model_path} if model_path else {"base_model": base_model}
        opened = await transport.call(
            "POST",
            "create_sampling_session",
            {
                "type": "create_sampling_session",
                "session_id": session_id,
                "sampling_session_seq_id": next(self._session.sampling_seqs),
                **wanted,
            },
        )
        sampler_id = opened.text_field("sampling_session_id")
        answer = await transport.call("GET", f"samplers/{sampler_id}")
        described = answer.parsed(types.GetSamplerResponse)
        return SamplerIds(session_id, sampler_id, described.base_model, described.tokenizer_id)

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(*reason_of(error)).result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # shield: a cancelled program still tells the server why it ends.
        await asyncio.shield(self.close(*reason_of(error)).coroutine())
