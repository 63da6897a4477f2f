"""luthier run: training runs, and the loss curve of one that writes its metrics to a file."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.remote import (
    JsonOption,
    LimitOption,
    fail,
    server,
    show_fields,
    show_json,
    show_table,
)
from luthier.metrics import read_metrics

app = typer.Typer(no_args_is_help=True, help="Training runs.")
BARS = " ▁▂▃▄▅▆▇█"
REDRAW_S = 1.0


@app.command("list")
def list_runs(
    limit: LimitOption = 20,
    offset: Annotated[int, typer.Option(min=0, help="How many to pass over.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Your training runs, latest activity first."""
    with server() as rest:
        page = rest.list_training_runs(limit, offset).result()
    if as_json:
        show_json(page)
        return
    rows = [
        (run.training_run_id, run.base_model, run.lora_rank, run.last_request_time)
        for run in page.training_runs
    ]
    show_table(("run", "base model", "rank", "last request"), rows)
    typer.echo(f"{len(rows)} of {page.cursor.total_count}", err=True)


@app.command()
def keep_last(
    run_id: str,
    number: Annotated[
        int | None,
        typer.Argument(min=0, help="Of each kind; 0 keeps all. Leave it out for the default."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let all but the newest checkpoints of a run expire, now and from now on."""
    with server() as rest:
        rest.set_keep_last(run_id, number).result()
    if as_json:
        show_json({"training_run_id": run_id, "keep_last": number})
    else:
        typer.echo(f"{run_id}: keeps {'the default' if number is None else number or 'all'}")


@app.command()
def info(run_id: str, as_json: JsonOption = False) -> None:
    """One training run."""
    with server() as rest:
        run = rest.get_training_run(run_id).result()
    if as_json:
        show_json(run)
        return
    show_fields(run.model_copy(update={"recovered": len(run.recovered or ())}))
    if run.recovered:
        show_table(
            ("recovered", "cause", "from seq", "to seq", "outcome", "seconds", "on"),
            [
                (
                    *(event.at, event.cause, event.from_seq, event.to_seq),
                    *(event.outcome, event.seconds, event.worker),
                )
                for event in run.recovered
            ],
        )


@app.command()
def watch(
    path: Annotated[Path, typer.Argument(help="A file that luthier.MetricsLog writes.")],
    metric: Annotated[str, typer.Option(help="Which metric.")] = "loss",
    once: Annotated[bool, typer.Option("--once", help="Draw it once.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The curve of a metric, drawn again as the file grows; Ctrl-C ends it."""
    if not path.exists():
        fail(f"{path}: no such file", 2)
    if as_json:
        show_json({"metric": metric, "points": _points(path, metric)})
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if once:
        console.print(_curve(_points(path, metric), metric, console.width), highlight=False)
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                curve = _curve(_points(path, metric), metric, console.width)
                live.update(curve, refresh=True)
                time.sleep(REDRAW_S)
    except KeyboardInterrupt:
        pass


def _points(path: Path, metric: str) -> list[list[Any]]:
    """[step, value] of every line that has the metric."""
    return [
        [line["step"], line[metric]]
        for line in read_metrics(path)
        if isinstance(line.get(metric), int | float)
    ]


def _curve(points: list[list[Any]], metric: str, width: int) -> str:
    """One line of bars over the steps, and where it began, is, and was lowest."""
    if not points:
        return f"{metric}: no values yet"
    values = [float(value) for _, value in points]
    low, high = min(values), max(values)
    num = max(min(width - 2, len(values)), 1)
    buckets = [values[i * len(values) // num : (i + 1) * len(values) // num] for i in range(num)]
    span = (high - low) or 1.0
    bars = "".join(
        BARS[1 + int((sum(bucket) / len(bucket) - low) / span * 7)] for bucket in buckets
    )
    return (
        f"{bars}\n{metric}: first {values[0]:.4g}, now {values[-1]:.4g} at step {points[-1][0]}, "
        f"lowest {low:.4g}"
    )
