"""Where models are: the shipped one, folders, and the Hub, by id or by short name.

For: turning what a user names into a folder on this machine. Not for: reading what is in it (`checkpoint`). No torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffucoder.errors import CheckpointError

SHIPPED = Path(__file__).parents[1] / "data" / "tiny"


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
        return isinstance(try_to_load_from_cache(self.hub_id, "config.json"), str)


_APPLE = "apple-amlr (research only)"
KNOWN_MODELS = (
    KnownModel("base", "apple/DiffuCoder-7B-Base", "7.6B", 15.2, _APPLE, "completes code; no chat"),
    KnownModel("instruct", "apple/DiffuCoder-7B-Instruct", "7.6B", 15.2, _APPLE, "Base after instruction tuning"),
    KnownModel("cpgrpo", "apple/DiffuCoder-7B-cpGRPO", "7.6B", 15.2, _APPLE, "Instruct after coupled-GRPO"),
    KnownModel("dream-base", "Dream-org/Dream-v0-Base-7B", "7.6B", 15.2, "Apache-2.0", "general text"),
    KnownModel("dream", "Dream-org/Dream-v0-Instruct-7B", "7.6B", 15.2, "Apache-2.0", "general chat"),
    KnownModel("dream-coder", "Dream-org/Dream-Coder-v0-Instruct-7B", "7.6B", 15.2, "Apache-2.0", "code chat"),
)


def find(source: str | Path | None, *, revision: str | None, patterns: list[str]) -> Path:
    """The folder that holds `source`, fetched from the Hub if need be."""
    if source is None:
        if not SHIPPED.is_dir():
            raise CheckpointError("no model ships with this installation; name a folder or a Hub id")
        return SHIPPED
    folder = Path(os.path.expanduser(source))  # unlike Path.expanduser it leaves an unknown ~user as it is
    if folder.is_dir():
        return folder
    name = next((known.hub_id for known in KNOWN_MODELS if known.name == str(source)), str(source))
    if isinstance(source, Path) or name.count("/") != 1 or name[0] in "/.~":
        known = ", ".join(model.name for model in KNOWN_MODELS)
        raise CheckpointError(f"model {str(source)!r} is no folder, no Hub id (owner/name) and none of {known}")
    return _fetch(name, revision, patterns)


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Download (or find in the cache) the files of Hub repository `name` that match `patterns`."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=5))
    except GatedRepoError as error:
        message = f"model {name!r} is gated; accept its terms at https://huggingface.co/{name} and run 'hf auth login'"
        raise CheckpointError(message) from error
    except RepositoryNotFoundError as error:
        message = f"model {name!r} is neither a folder here nor on the Hub; check the name, or log in if it is private"
        raise CheckpointError(message) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model {name!r} has no revision {revision!r}; leave it out for the newest") from error
    except HFValidationError as error:
        raise CheckpointError(f"model {name!r} is no folder, and no Hub id either; write owner/name") from error
    except (OSError, HTTPError) as error:  # no network, and nothing in the cache to fall back on
        message = f"model {name!r} is not on this machine and the Hub cannot be reached; connect, or give a folder"
        raise CheckpointError(message) from error
