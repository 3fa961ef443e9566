"""Where models are: the shipped one, folders, and the Hub, by id or by short name. Needs no torch.

huggingface_hub is imported where it is called: a model in a folder does not need it.
"""

import csv
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from diffucoder.errors import CheckpointError

SHIPPED = Path(__file__).parents[1] / "data" / "tiny"
TEXT_FILES = ["*.json", "*.jinja", "merges.txt"]
WEIGHT_FILES = ["*.safetensors"]


@dataclass(frozen=True)
class KnownModel:
    """A published checkpoint that loads by its short `name`."""

    name: str
    hub_id: str
    parameters: str
    size_gb: float
    licence: str
    note: str

    @property
    def cached(self) -> bool:
        """Whether the Hub's cache on this machine holds it."""
        from huggingface_hub import try_to_load_from_cache

        paths = [try_to_load_from_cache(self.hub_id, name) for name in ("config.json", "adapter_config.json")]
        return any(isinstance(path, str) for path in paths)


@cache
def known_models() -> tuple[KnownModel, ...]:
    """The published checkpoints that load by a short name: the rows of `data/models.csv`."""
    rows = csv.DictReader((SHIPPED.parent / "models.csv").read_text(encoding="utf-8").splitlines())
    return tuple(KnownModel(size_gb=float(row.pop("size_gb")), **row) for row in rows)


def find(source: str | Path | None, *, revision: str | None = None, weights: bool = False, fetch: bool = True) -> Path:
    """The folder of `source`, or of the shipped model (None); files of the Hub are downloaded if need be.

    Without `fetch` nothing asks the Hub: for names that a file holds, which may be anybody's.

    CheckpointError if there is no such model, the name has two meanings here, or the Hub cannot be reached.
    """
    if source is None:
        if not SHIPPED.is_dir():
            raise CheckpointError("no model ships with this installation; name a folder or a Hub id")
        return SHIPPED
    if len(str(source)) > 4000 or "\0" in str(source):
        raise CheckpointError(f"model {str(source)[:40]!r}... is not the name of a folder or a model; shorten it")
    folder = Path(os.path.expanduser(source))  # unlike Path.expanduser it leaves an unknown ~user as it is
    known = {model.name: model.hub_id for model in known_models()} | {"tiny": str(SHIPPED)}
    is_known = isinstance(source, str) and source in known
    if is_known and os.path.exists(folder / "config.json"):
        raise CheckpointError(
            f"model {source!r} is both a known name and a folder here; write './{source}' for the folder, or "
            f"{known[str(source)]!r} for the known model"
        )
    if source == "tiny":
        return find(None)
    if os.path.isdir(folder) and not is_known:
        return folder
    if folder.suffix == ".gguf":
        raise CheckpointError(
            f"model {str(source)!r} is a GGUF file, which has to be converted first: diffucoder convert {source} FOLDER"
        )
    if os.path.isfile(folder):
        raise CheckpointError(f"model {str(source)!r} is a file; name the folder that it is in")
    hub_id = known.get(str(source), str(source))
    if isinstance(source, Path) or hub_id.count("/") != 1 or hub_id[0] in "/.~":
        names = ", ".join(known)
        raise CheckpointError(f"model {str(source)!r} is not a folder, a Hub id (owner/name) or one of {names}")
    patterns = TEXT_FILES + WEIGHT_FILES if weights else TEXT_FILES
    return _download(hub_id, revision, patterns, fetch=fetch)


def _download(hub_id: str, revision: str | None, patterns: list[str], *, fetch: bool) -> Path:
    """Bring the files of a Hub repository that match `patterns` into the Hub's cache, if they are not there."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, etag_timeout=5, local_files_only=not fetch
        )
        return Path(folder)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise CheckpointError(f"model {hub_id!r} {_reason(error, hub_id, revision)}") from error


def _reason(error: Exception, hub_id: str, revision: str | None) -> str:
    """What a download that failed says about the model, and the way out."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at https://huggingface.co/{hub_id} and run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is neither a folder here nor on the Hub; check the name, or log in if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; leave it out for the newest"
    if isinstance(error, errors.HFValidationError):
        return "is not a folder and not a valid Hub id; write owner/name"
    return "is not on this machine and the Hub cannot be reached; connect, or give a folder"
