"""luthier session, model, usage and chat."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from luthier import types
from luthier.cli.remote import (
    WRONG_USE,
    JsonOption,
    LimitOption,
    fail,
    fetch,
    server,
    show_fields,
    show_json,
    show_table,
    told_errors,
)
from luthier.progress import printable
from luthier.sampling import SamplingClient
from luthier.service import ServiceClient

sessions = typer.Typer(no_args_is_help=True, help="Sessions.")
models = typer.Typer(no_args_is_help=True, help="Models.")


@sessions.command("list")
def list_sessions(limit: LimitOption = 20, as_json: JsonOption = False) -> None:
    """Ids of your sessions, newest first."""
    with server() as rest:
        page = rest.list_sessions(limit).result()
    if as_json:
        show_json(page)
    else:
        show_table(("session",), [(session,) for session in page.sessions])


@sessions.command("info")
def session_info(session_id: str, as_json: JsonOption = False) -> None:
    """The runs and samplers of a session."""
    with server() as rest:
        session = rest.get_session(session_id).result()
    (show_json if as_json else show_fields)(session)


@sessions.command()
def queue(session_id: str, as_json: JsonOption = False) -> None:
    """Why its runs wait: what for, since when, and which worker has them."""
    with server() as rest:
        page = rest.get_session_queue(session_id).result()
    if as_json:
        show_json(page)
        return
    rows = [
        (run.run_id, run.num_queued, run.num_parked, run.since_s, run.worker, run.waits_for)
        for run in page.runs
    ]
    show_table(("run", "queued", "parked", "since, s", "worker", "waits for"), rows)


@sessions.command()
def trace(
    session_id: str,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File. [default: SESSION_ID.pftrace]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """When its requests waited and ran, as a file for https://ui.perfetto.dev."""
    path = out or Path(f"{session_id}.pftrace")
    with server() as rest:
        fetch(rest.export_session_trace(session_id).result(), path)
    if as_json:
        show_json({"session_id": session_id, "path": str(path)})
    else:
        typer.echo(f"{session_id}: downloaded to {path}")


@models.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """The server's base models."""
    with server() as rest:
        capabilities = rest.get_server_capabilities().result()
    if as_json:
        show_json(capabilities)
        return
    rows = [
        (model.model_name, model.max_context_length, model.trainable, model.sampleable)
        for model in capabilities.supported_models
    ]
    show_table(("model", "context", "trains", "samples"), rows)


def usage(
    days: Annotated[int, typer.Option(min=1, max=14, help="Of the last days.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Tokens and storage by base model and kind."""
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    with server() as rest:
        told = rest.get_billing_usage(until - timedelta(days=days), until).result()
    if as_json:
        show_json(told)
        return
    totals: dict[tuple[str, str], float] = {}
    for event in told.data:
        row = (event.base_model or "-", event.event_info.type)
        totals[row] = totals.get(row, 0.0) + _amount(event.event_info)
    rows = [(*row, f"{amount:,.1f}".removesuffix(".0")) for row, amount in sorted(totals.items())]
    show_table(("base model", "kind", "tokens, checkpoints or GB hours"), rows)


def _amount(info: types.BillingEventInfo) -> float:
    match info:
        case types.CheckpointBillingEvent():
            return float(info.count)
        case types.StorageBillingEvent():
            return info.gigabyte_hours
        case _:
            return float(info.token_count)


def chat(
    model: Annotated[
        str, typer.Argument(help="tinker://RUN/sampler_weights/NAME, or a base model.")
    ],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say one thing.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    as_json: JsonOption = False,
) -> None:
    """Talk to a model in the terminal; an empty line, or the end of the input, ends it."""
    if as_json and message is None:
        fail("--json goes with --message", WRONG_USE)
    params = types.SamplingParams(temperature=temperature, max_tokens=max_tokens)
    is_path = model.startswith("tinker://")
    with told_errors(), ServiceClient() as service:
        sampling = service.create_sampling_client(
            model_path=model if is_path else None, base_model=None if is_path else model
        ).result()
        if message is not None:
            answer = _answer(sampling, [{"role": "user", "content": message}], params)
            if as_json:
                show_json({"model": model, "answer": answer})
            else:
                typer.echo(_terminal(answer))
            return
        said: list[dict[str, str]] = []
        while line := _read_line():
            said.append({"role": "user", "content": line})
            said.append({"role": "assistant", "content": _answer(sampling, said, params)})
            typer.echo(_terminal(said[-1]["content"]))


def _read_line() -> str:
    try:
        return input("you: ")
    except EOFError:
        return ""


def _answer(
    sampling: SamplingClient, said: list[dict[str, str]], params: types.SamplingParams
) -> str:
    tokenizer = sampling.get_tokenizer()
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(text, add_special_tokens=False)
    else:  # a base model goes on with what was said
        tokens = tokenizer.encode("\n".join(turn["content"] for turn in said))
    prompt = types.ModelInput.from_ints(tokens)
    sampled = sampling.sample(prompt, 1, params).result().sequences[0].tokens
    return str(tokenizer.decode(sampled, skip_special_tokens=True))


def _terminal(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())
