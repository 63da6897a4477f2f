"""luthier run: training runs, and the curve of a metric, from the server or from a file."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.remote import (
    WRONG_USE,
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
PAGE = 1000
Point = tuple[int, float]
"""(step of a file or seq of a run, value)"""


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
def cancel_queued(run_id: str, as_json: JsonOption = False) -> None:
    """Let everything that a run has queued fail; what is being executed ends as it would."""
    with server() as rest:
        answer = rest.cancel_queued(run_id).result()
    if as_json:
        show_json(answer)
    else:
        typer.echo(f"{run_id}: {answer.num_cancelled} cancelled")


@app.command()
def info(run_id: str, as_json: JsonOption = False) -> None:
    """One training run."""
    with server() as rest:
        run = rest.get_training_run(run_id).result()
    if as_json:
        show_json(run)
        return
    show_fields(run.model_copy(update={"recovered": None}))
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
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FILE", help="A run, or a file that luthier.MetricsLog writes."
        ),
    ],
    metric: Annotated[str, typer.Option(help="Which one; `loss` is `loss:sum` too.")] = "loss",
    once: Annotated[bool, typer.Option("--once", help="Draw it once.")] = False,
    as_json: JsonOption = False,
) -> None:
    """The curve of a metric, drawn again as it grows; Ctrl-C ends it."""
    if Path(source).exists():
        points = _points_of_file(Path(source), metric)
    elif ":" in source:
        points = _points_of_run(source, metric)
    else:
        fail(f"{source}: no such file, and no training run", WRONG_USE)
    if as_json:
        show_json({"metric": metric, "points": next(points)})
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    if once:
        console.print(_curve(next(points), metric, console.width), highlight=False)
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        for now in points:
            live.update(Text(_curve(now, metric, console.width)), refresh=True)
            time.sleep(REDRAW_S)


def _points_of_file(path: Path, metric: str) -> Iterator[list[Point]]:
    """All points that there are, each time anew."""
    while True:
        yield [
            (line["step"], value)
            for line in read_metrics(path)
            if (value := _value(line, metric)) is not None
        ]


def _points_of_run(run_id: str, metric: str) -> Iterator[list[Point]]:
    """As _points_of_file. Passes that only score are no part of the curve of training."""
    points: list[Point] = []
    after = -1
    with server() as rest:
        while True:
            page = rest.get_run_metrics(run_id, after, PAGE).result()
            points += [
                (entry.seq, value)
                for entry in page.entries
                if entry.kind != "forward" and (value := _value(entry.metrics, metric)) is not None
            ]
            after = page.last_seq
            if len(page.entries) < PAGE:
                yield points


def _value(metrics: Mapping[str, Any], metric: str) -> float | None:
    """Of the name, or of one with the way in which it was reduced behind it."""
    named = (value for name, value in metrics.items() if metric in (name, name.partition(":")[0]))
    return next((float(value) for value in named if isinstance(value, int | float)), None)


def _curve(points: Sequence[Point], metric: str, width: int) -> str:
    """One line of bars over the steps, and where it began, is, and was lowest."""
    if not points:
        return f"{metric}: no values yet"
    values = [value for _, value in points]
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
