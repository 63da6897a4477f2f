"""TrainingClient: forward, backward and optimizer steps of one training run, in call order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from luthier import types, wire
from luthier._loop import handle_of, operation, value_of, waited
from luthier.custom_loss import CustomLossFn
from luthier.future import APIFuture, Opening
from luthier.optional import needed
from luthier.passes import Passes
from luthier.run_requests import RunRequests
from luthier.sampling import SamplerIds, SamplingClient
from luthier.session import Session
from luthier.tokenizer import tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class RunIds:
    """What names a training run on the server."""

    model_id: str
    info: types.GetInfoResponse


class TrainingClient(Opening[RunIds]):
    """One training run. From ServiceClient.create_lora_training_client and its kin.

    Requests are executed in the order of the calls. Send the next before you wait for the last:

        gradient = training.forward_backward(data, "cross_entropy")
        update = training.optim_step(AdamParams(learning_rate=1e-4))
        loss, norm = gradient.result().metrics["loss:sum"], update.result().metrics
    """

    def __init__(self, session: Session, opening: APIFuture[RunIds]) -> None:
        super().__init__(opening)
        self._session = session
        self._requests = RunRequests(session, self._opened_id)
        self._passes = Passes(session, self._requests)

    async def _opened_id(self) -> str:
        return (await self._opened()).model_id

    @property
    def model_id(self) -> str:
        """`<session id>:train:<number>`, once the run is there; waits for that."""
        return self._opening.result().model_id

    # --- forward and backward --------------------------------------------------------------------

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Loss and log probabilities (nats) of the data; gradients stay as they are.

        `loss_fn_outputs[i]["logprobs"]` of the result is float32 in the shape of the target_tokens
        of `data[i]`: [T], or [T, K]. RequestFailedError names what is wrong with the data.
        """
        return self._pass(data, loss_fn, loss_fn_config, forward_only=True)

    forward_async = handle_of(forward)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: types.LossFnType,
        loss_fn_config: Mapping[str, float | str] | None = None,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """Like forward, and adds the gradient of the loss to the run's.

        The loss is a sum over tokens and data, so parts may be sent one by one. `data` is read
        before this returns. Outputs are those of forward; RequestFailedError names what is wrong.
        """
        return self._pass(data, loss_fn, loss_fn_config, forward_only=False)

    forward_backward_async = handle_of(forward_backward)

    def forward_backward_custom(
        self, data: Sequence[types.Datum], loss_fn: CustomLossFn
    ) -> APIFuture[types.ForwardBackwardOutput]:
        """The gradient of a loss of your own, for one more forward pass than forward_backward.

        `loss_fn(data, logprobs)` gets one float32 torch tensor per datum, in the shape of its
        target_tokens, and returns a scalar tensor and metrics to report. It runs on a thread of
        its own. If it raises, the result raises the same, and requests that were made before that
        could be known are not sent. ImportError without torch.
        """
        needed("torch", "forward_backward_custom")
        call = self._requests.next_call()
        return self._session.start(self._passes.run_custom(call, list(data), loss_fn))

    forward_backward_custom_async = handle_of(forward_backward_custom)

    def _pass(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        config: Mapping[str, float | str] | None,
        *,
        forward_only: bool,
    ) -> APIFuture[types.ForwardBackwardOutput]:
        # Encoded here and now: the caller may change its arrays after this returns.
        encoded = [wire.encode_datum(datum) for datum in data]
        request = wire.loss_request(loss_fn, config, forward_only=forward_only)
        call = self._requests.next_call()
        return self._session.start(self._passes.run(call, encoded, request))

    # --- optimizer, saving, loading --------------------------------------------------------------

    def optim_step(
        self,
        optim_params: types.OptimParams | None = None,
        *,
        adam_params: types.AdamParams | None = None,
    ) -> APIFuture[types.OptimStepResponse]:
        """Changes the weights by the gradient so far, and clears it. Default: AdamParams()."""
        params = optim_params or adam_params or types.AdamParams()
        name = "adam_params" if isinstance(params, types.AdamParams) else "optimizer_params"
        return self._request("optim_step", types.OptimStepResponse, **{name: params.model_dump()})

    optim_step_async = handle_of(optim_step)

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsResponse]:
        """Saves weights and optimizer state, to resume from; a name that exists is an error
        unless overwrite. ttl_seconds: 3600 or more, None keeps it."""
        return self._request(
            "save_weights",
            types.SaveWeightsResponse,
            path=name,
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
            user_metadata=user_metadata,
        )

    save_state_async = handle_of(save_state)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[types.SaveWeightsForSamplerResponse]:
        """Saves weights to sample from, under a name and for as long as ttl_seconds."""
        return self._request(
            "save_weights_for_sampler",
            types.SaveWeightsForSamplerResponse,
            path=name,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata,
        )

    save_weights_for_sampler_async = handle_of(save_weights_for_sampler)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: list[str] | None = None,
    ) -> APIFuture[types.SaveWeightsExternalResponse]:
        """Saves files for download, in PEFT's form."""
        return self._request(
            "save_weights_external",
            types.SaveWeightsExternalResponse,
            path=name,
            ttl_seconds=ttl_seconds,
            age_encryption_recipients=age_encryption_recipients,
        )

    save_weights_external_async = handle_of(save_weights_external)

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Loads the weights of a saved state; the optimizer starts anew."""
        return self._load(path, weights_access_token, optimizer=False)

    load_state_async = handle_of(load_state)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[types.LoadWeightsResponse]:
        """Loads a saved state as it was."""
        return self._load(path, weights_access_token, optimizer=True)

    load_state_with_optimizer_async = handle_of(load_state_with_optimizer)

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[types.LoadWeightsResponse]:
        return self._request(
            "load_weights",
            types.LoadWeightsResponse,
            path=path,
            optimizer=optimizer,
            weights_access_token=token,
        )

    # --- sampling clients ------------------------------------------------------------------------

    def save_weights_and_get_sampling_client(
        self, name: str | None = None, kind: types.SamplingClientKind = "snapshot"
    ) -> SamplingClient:
        """A client that samples with the weights as all earlier calls leave them.

        Without a name they last as long as this session; with one they are saved under it.
        """
        if name is not None:
            saved = self.save_weights_for_sampler(name)
            return SamplingClient(self._session, self._session.start(self._sampler_of(saved)))
        opening = self._snapshot(self._requests.next_call(), kind)
        return SamplingClient(self._session, self._session.start(opening))

    save_weights_and_get_sampling_client_async = value_of(save_weights_and_get_sampling_client)

    def create_sampling_client(self, model_path: str) -> SamplingClient:
        """A client that samples with saved weights, such as those of save_weights_for_sampler."""
        return SamplingClient(self._session, self._session.start(self._sampler(model_path)))

    create_sampling_client_async = value_of(create_sampling_client)

    async def _snapshot(self, call: int, kind: types.SamplingClientKind) -> SamplerIds:
        fields = {"kind": kind, "sampling_session_seq_id": next(self._session.sampling_seqs)}
        response = await self._requests.json_result(call, "save_weights_for_sampler", fields)
        return await self._sampler_ids(response.text_field("sampling_session_id"))

    async def _sampler_of(
        self, saved: APIFuture[types.SaveWeightsForSamplerResponse]
    ) -> SamplerIds:
        return await self._sampler((await saved).path)

    async def _sampler(self, model_path: str) -> SamplerIds:
        await self._opened()  # no sampler of a run that never came to be
        return await self._sampler_ids(await self._session.open_sampler({"model_path": model_path}))

    async def _sampler_ids(self, sampling_session_id: str) -> SamplerIds:
        data = (await self._opened()).info.model_data
        session_id = await self._session.id()
        return SamplerIds(session_id, sampling_session_id, data.model_name or "", data.tokenizer_id)

    # --- what it is ------------------------------------------------------------------------------

    @operation
    async def _info(self) -> types.GetInfoResponse:
        """The run's base model, LoRA rank and tokenizer."""
        return (await self._opened()).info

    get_info = waited(_info)
    get_info_async = value_of(_info)

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The base model's tokenizer; ImportError without transformers."""
        data = self.get_info().model_data
        return tokenizer_of(data.model_name, data.tokenizer_id)

    # --- how requests go out ---------------------------------------------------------------------

    def _request(self, endpoint: str, result: type[M], **fields: Any) -> APIFuture[M]:
        call = self._requests.next_call()
        return self._session.start(self._parsed(call, endpoint, result, fields))

    async def _parsed(self, call: int, endpoint: str, result: type[M], fields: dict[str, Any]) -> M:
        return (await self._requests.json_result(call, endpoint, fields)).parsed(result)
