"""The `luthier` command. Heavy imports wait until a command needs them."""

import importlib.util
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
except ModuleNotFoundError:  # the console script exists without its extra too
    raise SystemExit("luthier: the command needs its extra: pip install 'luthier[cli]'") from None

from luthier import __version__
from luthier.cli import admin, checkpoints, keys, runs, server
from luthier.cli.remote import JsonOption

SERVER_MODULES = ("psutil", "redis", "minio", "torch", "transformers", "peft", "safetensors")

app = typer.Typer(
    help="Luthier: post-train language models on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.add_typer(runs.app, name="run")
app.add_typer(checkpoints.app, name="checkpoint")
app.add_typer(server.sessions, name="session")
app.add_typer(server.models, name="model")
app.command()(server.usage)
app.command()(server.chat)
app.add_typer(keys.app, name="key")
app.add_typer(admin.app, name="admin")

DataOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of the stack. [default: $XDG_DATA_HOME/luthier]",
        show_default=False,
    ),
]


@app.command()
def up(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: any free one.")] = 8080,
    data: DataOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH_OR_HF_ID", help="Model to serve. [default: a tiny demo model]"
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY[=TENANT]", help="Key to accept. [default: one made at first start]"
        ),
    ] = None,
    redis: Annotated[
        str, typer.Option(metavar="URL", help="Redis to use in place of our own Valkey.")
    ] = "",
    allow_volatile_redis: Annotated[
        bool,
        typer.Option(
            "--allow-volatile-redis",
            help="Take a Redis without append-only file, or one that evicts keys: for play.",
        ),
    ] = False,
    s3: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="s3+http://HOST:PORT/BUCKET in place of this disk; credentials from "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        ),
    ] = "",
    trainers: Annotated[int, typer.Option(min=1, help="Trainers per model.")] = 1,
    samplers: Annotated[int, typer.Option(min=1, help="Samplers per model.")] = 1,
    sampler_engine: Annotated[
        str, typer.Option(metavar="torch|vllm", help="What samplers generate with.")
    ] = "torch",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[SECTION.]KEY=VALUE",
            help="Setting of docs/operating.md, such as limits.custom_losses=true.",
        ),
    ] = None,
    run: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="Once ready, run COMMAND with TINKER_BASE_URL and TINKER_API_KEY set, then stop "
            "everything and exit with its code.",
        ),
    ] = "",
) -> None:
    """Start the whole stack on this machine; Ctrl-C drains and stops it."""
    missing = [name for name in SERVER_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        _refuse("up", f"needs {', '.join(missing)}: pip install 'luthier[worker]'")
    from luthier.up import options
    from luthier.up.run import run_up
    from luthier_core.errors import ConfigError

    try:
        code = run_up(
            options.UpOptions(
                data=data or options.default_data_dir(os.environ),
                host=host,
                port=port,
                models=options.parse_models(model or ()),
                api_keys=options.parse_api_keys(api_key or ()),
                redis_url=options.check_redis_url(redis) if redis else "",
                allow_volatile_redis=allow_volatile_redis,
                s3_url=options.check_s3_url(s3) if s3 else "",
                num_trainers=trainers,
                num_samplers=samplers,
                settings=options.parse_settings(
                    (f"sampler.engine={sampler_engine}", *(set_ or ()))
                ),
                command=run,
            ),
            os.environ,
        )
    except ConfigError as error:
        _refuse("up", str(error))
    raise typer.Exit(code)


@app.command()
def status(data: DataOption = None, as_json: JsonOption = False) -> None:
    """Show the parts of the running stack, their memory, and its time to ready."""
    from rich.console import Console

    from luthier.up.options import default_data_dir
    from luthier.up.status import parts_table, read_status

    folder = data or default_data_dir(os.environ)
    stack = read_status(folder)
    if stack is None:
        typer.echo(f"luthier status: nothing runs on {folder}", err=True)
        raise typer.Exit(1)
    if as_json:
        typer.echo(json.dumps(asdict(stack), indent=2))
        return
    console = Console()
    console.print(parts_table(stack.parts, with_pss=True))
    ready = (
        "not ready yet" if stack.ready_after_s is None else f"ready in {stack.ready_after_s:.1f} s"
    )
    console.print(f"{stack.url}: {ready}", highlight=False)


@app.command()
def version(as_json: JsonOption = False) -> None:
    """Print the version."""
    typer.echo(json.dumps({"version": __version__}) if as_json else __version__)


def main() -> None:
    """The console script."""
    app()


def _refuse(command: str, reason: str) -> NoReturn:
    """One line on standard error, exit 2."""
    typer.echo(f"luthier {command}: {' '.join(reason.split())}", err=True)
    raise typer.Exit(2)
