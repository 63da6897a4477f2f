"""luthier checkpoint: list, describe, publish, expire, delete, download and upload."""

import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer

from luthier.cli.remote import (
    REFUSED,
    WRONG_USE,
    JsonOption,
    LimitOption,
    PathArgument,
    fail,
    fetch,
    server,
    show_fields,
    show_json,
    show_table,
    size_text,
    transfer_bar,
)
from luthier.rest import RestClient
from luthier.types import Checkpoint, ParsedCheckpointTinkerPath

app = typer.Typer(no_args_is_help=True, help="Checkpoints.")


@app.command("list")
def list_checkpoints(
    run_id: Annotated[str | None, typer.Option(help="Of this run only.")] = None,
    limit: LimitOption = 100,
    as_json: JsonOption = False,
) -> None:
    """Your checkpoints, newest first."""
    with server() as rest:
        if run_id is None:
            page = rest.list_user_checkpoints(limit).result()
        else:
            page = rest.list_checkpoints(run_id).result()
    if as_json:
        show_json(page)
        return
    rows = [
        (one.tinker_path, one.time, size_text(one.size_bytes), one.public, one.expires_at)
        for one in page.checkpoints[:limit]
    ]
    show_table(("path", "saved", "size", "public", "expires"), rows)


@app.command()
def info(tinker_path: PathArgument, as_json: JsonOption = False) -> None:
    """One checkpoint."""
    with server() as rest:
        checkpoint = _find(rest, tinker_path)
    (show_json if as_json else show_fields)(checkpoint)


@app.command()
def publish(tinker_path: PathArgument, as_json: JsonOption = False) -> None:
    """Let everybody with a key of this server load it."""
    with server() as rest:
        rest.publish_checkpoint_from_tinker_path(tinker_path).result()
    _said("published", tinker_path, as_json)


@app.command()
def unpublish(tinker_path: PathArgument, as_json: JsonOption = False) -> None:
    """Take a publication back."""
    with server() as rest:
        rest.unpublish_checkpoint_from_tinker_path(tinker_path).result()
    _said("unpublished", tinker_path, as_json)


@app.command()
def set_ttl(
    tinker_path: PathArgument,
    seconds: Annotated[
        int | None, typer.Argument(min=3600, help="From now; leave it out to keep the checkpoint.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let it expire, or keep it."""
    with server() as rest:
        rest.set_checkpoint_ttl_from_tinker_path(tinker_path, seconds).result()
    _said("kept" if seconds is None else f"expires in {seconds} s", tinker_path, as_json)


@app.command()
def delete(
    tinker_paths: Annotated[list[str], typer.Argument(metavar="TINKER_PATH...")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete checkpoints for good."""
    if not yes:
        typer.confirm(f"Delete {', '.join(tinker_paths)}?", abort=True)
    with server() as rest:
        deletions = [rest.delete_checkpoint_from_tinker_path(path) for path in tinker_paths]
        for path, deletion in zip(tinker_paths, deletions, strict=True):
            deletion.result()
            _said("deleted", path, as_json)


@app.command()
def download(
    tinker_path: PathArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder. [default: the checkpoint's name]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch its files into a new folder."""
    with server() as rest:
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        folder = out or Path(parsed.checkpoint_id.rpartition("/")[2])
        if folder.exists():
            fail(f"{folder} exists already", WRONG_USE)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Into place in one step: a folder that is there is complete.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as part:
            files = Path(part) / "files"
            files.mkdir()
            if parsed.checkpoint_type == "external":
                _fetch_files(rest, tinker_path, files)
            else:
                _fetch_archive(rest, tinker_path, files)
            files.rename(folder)
    _said(f"downloaded to {folder}", tinker_path, as_json)


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="With a PEFT adapter.", exists=True)],
    base_model: Annotated[
        str | None, typer.Option(help="[default: the one in its adapter_config.json]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="[default: the folder's name]")] = None,
    ttl_seconds: Annotated[int | None, typer.Option(min=3600, help="Let it expire.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a checkpoint of an adapter that was made elsewhere."""
    with server() as rest, transfer_bar() as bar:
        task = bar.add_task(folder.name)

        def show(num_sent: int, num_bytes: int) -> None:
            bar.update(task, completed=num_sent, total=num_bytes)

        uploaded = rest.upload_checkpoint(
            folder, base_model, name, ttl_seconds=ttl_seconds, on_progress=show
        ).result()
    (show_json if as_json else show_fields)(uploaded)


def _fetch_archive(rest: RestClient, tinker_path: str, folder: Path) -> None:
    archive = rest.get_checkpoint_archive_url_from_tinker_path(tinker_path).result()
    tar_path = folder.with_suffix(".tar")
    fetch(archive.url, tar_path)
    with tarfile.open(tar_path) as tar:
        _unpack(tar, folder)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """The regular files of an archive; Python 3.11.2 has no `extractall` that stays in a folder."""
    for member in tar:
        source = tar.extractfile(member) if member.isreg() else None
        if source is None:
            fail(f"the server's archive has something that is no file: {member.name!r}", REFUSED)
        with source, _target(folder, member.name).open("wb") as file:
            shutil.copyfileobj(source, file)


def _fetch_files(rest: RestClient, tinker_path: str, folder: Path) -> None:
    urls = rest.get_external_weights_urls(tinker_path).result().urls
    for name, url in sorted(urls.items()):
        fetch(url, _target(folder, name))


def _target(folder: Path, name: str) -> Path:
    """Where a file goes that the server calls `name`; its folder is there."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        fail(f"the server names a file outside of the folder: {name!r}", REFUSED)
    target = folder / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _find(rest: RestClient, tinker_path: str) -> Checkpoint:
    run = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path).training_run_id
    for checkpoint in rest.list_checkpoints(run).result().checkpoints:
        if checkpoint.tinker_path == tinker_path:
            return checkpoint
    raise ValueError(f"no checkpoint {tinker_path}")


def _said(what: str, tinker_path: str, as_json: bool) -> None:
    if as_json:
        show_json({"tinker_path": tinker_path, "done": what})
    else:
        typer.echo(f"{tinker_path}: {what}")
