"""What the commands that talk to a server share: the client, the output, the exit codes.

0: done. 1: the server refused, or it failed. 2: wrong use. 3: the server cannot be reached.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import BaseModel

from luthier.errors import APIConnectionError, LuthierError
from luthier.progress import printable
from luthier.rest import RestClient

if TYPE_CHECKING:
    from rich.progress import Progress

REFUSED, WRONG_USE, UNREACHABLE = 1, 2, 3

WIDE = 1000
PIECE_BYTES = 1 << 20
DOWNLOAD_TIMEOUT_S = 60.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]
LimitOption = Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")]
PathArgument = Annotated[str, typer.Argument(metavar="TINKER_PATH", help="tinker://RUN/KIND/NAME")]


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """What a server, the network or a file refuses is one line and an exit code."""
    try:
        yield
    except APIConnectionError as error:
        fail(str(error), UNREACHABLE)
    except (LuthierError, ImportError, OSError, ValueError) as error:
        fail(str(error), REFUSED)


@contextlib.contextmanager
def server() -> Iterator[RestClient]:
    """The server of TINKER_BASE_URL."""
    with told_errors():
        yield RestClient()


def fail(reason: str, code: int) -> NoReturn:
    """One line on standard error."""
    typer.echo(f"luthier: {printable(' '.join(reason.split()))}", err=True)
    raise typer.Exit(code)


def show_json(value: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """A response as JSON, on one document of lines."""
    if isinstance(value, BaseModel):
        plain: Any = value.model_dump(mode="json")
    elif isinstance(value, dict):
        plain = value
    else:
        plain = [item.model_dump(mode="json") for item in value]
    typer.echo(json.dumps(plain, indent=2))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people; every cell is made safe for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(text_of(cell))) for cell in row))
    console = Console()
    if not console.is_terminal:  # a line a row, for grep and its like
        console.width = WIDE
    console.print(table)


def show_fields(value: BaseModel) -> None:
    """One thing, a line per field."""
    show_table(("", ""), list(value.model_dump().items()))


def transfer_bar() -> "Progress":
    """Bytes and speed of what is on its way; on a terminal only."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def fetch(url: str, target: Path) -> None:
    """A signed URL into a file, with a bar; it gets no key."""
    import urllib.request

    with (
        transfer_bar() as bar,
        urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as source,
        target.open("wb") as file,
    ):
        length = source.headers.get("Content-Length")
        task = bar.add_task(target.name, total=int(length) if length else None)
        while piece := source.read(PIECE_BYTES):
            file.write(piece)
            bar.advance(task, len(piece))
        if length and file.tell() != int(length):  # urllib takes a cut connection for the end
            raise OSError(f"{target.name}: {file.tell()} of {length} bytes came; try again")


def text_of(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, datetime):
        return cell.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return str(cell)


def size_text(num_bytes: int | None) -> str:
    """1536 -> "1.5 KiB"."""
    if num_bytes is None:
        return "-"
    size, units = float(num_bytes), ("B", "KiB", "MiB", "GiB")
    for unit in units:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
