"""The folders of the models to serve: given, downloaded, or the demo model built."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from luthier.up.folder import DataFolder
from luthier.up.options import ModelSource
from luthier.up.process import run_to_end
from luthier_core.errors import ConfigError

DEMO_NAME = "luthier/demo"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def check_models(sources: Sequence[ModelSource]) -> None:
    """ConfigError for a folder that is missing or is no model; nothing is downloaded yet."""
    for source in sources:
        path = _given_path(source)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise ConfigError(f"--model {source.name}: {path} has no config.json")
        elif source.where[0] in "/.~" or not HUB_ID.fullmatch(source.where):
            raise ConfigError(f"--model {source.name}: there is no folder {path}")


def _given_path(source: ModelSource) -> Path:
    return Path(source.where).expanduser().absolute()


async def fetch_models(
    sources: Sequence[ModelSource],
    folder: DataFolder,
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> list[tuple[str, Path]]:
    """(name, folder) of each model; ConfigError if one cannot be had."""
    if not sources:
        return [(DEMO_NAME, await _demo_model(folder, environ, say))]
    return [(source.name, await _model_folder(source, folder, environ, say)) for source in sources]


async def _demo_model(
    folder: DataFolder, environ: Mapping[str, str], say: Callable[[str], None]
) -> Path:
    if not any(folder.models.glob("luthier-demo-*")):
        say("building the demo model, once: about 30 s")
    argv = (sys.executable, "-m", "luthier_model.demo", "--cache", str(folder.models))
    try:
        return Path(await run_to_end(argv, environ, folder.log_file("demo-model")))
    except ConfigError as error:
        raise ConfigError(f"the demo model could not be built: {error}") from None


async def _model_folder(
    source: ModelSource,
    folder: DataFolder,
    environ: Mapping[str, str],
    say: Callable[[str], None],
) -> Path:
    given = _given_path(source)
    if given.is_dir():
        return given
    downloaded = folder.models / source.where.replace("/", "--")
    if not downloaded.is_dir():
        say(f"downloading {source.where} to {downloaded}")
        argv = (sys.executable, "-m", "luthier.up.download", source.where, str(downloaded))
        try:
            await run_to_end(argv, environ, folder.log_file("download"))
        except ConfigError as error:
            raise ConfigError(
                f"--model {source.name}: {source.where} is no folder here and was not "
                f"downloaded: {error}"
            ) from None
    return downloaded
