"""Where models are: the shipped one, folders, and the Hub, by id or by short name. Needs no torch."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import errors, snapshot_download, try_to_load_from_cache

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
    def memory_gb(self) -> int:
        """What a GPU, or a machine without one, needs: the weights in bfloat16, and as much as a short batch takes."""
        return math.ceil(1.2 * self.size_gb + 1)

    @property
    def cached(self) -> bool:
        """Whether the Hub's cache on this machine holds it."""
        return isinstance(try_to_load_from_cache(self.hub_id, "config.json"), str)


_APPLE = "apple-amlr (research only)"
_FREE = "Apache-2.0"
_UNKNOWN = "not stated; parent Apache-2.0"
KNOWN_MODELS = (
    KnownModel("base", "apple/DiffuCoder-7B-Base", "7.6B", 15.2, _APPLE, "completes code; no chat"),
    KnownModel("instruct", "apple/DiffuCoder-7B-Instruct", "7.6B", 15.2, _APPLE, "Base after instruction tuning"),
    KnownModel("cpgrpo", "apple/DiffuCoder-7B-cpGRPO", "7.6B", 15.2, _APPLE, "Instruct after coupled-GRPO"),
    KnownModel(
        "d2f", "SJTU-Deng-Lab/D2F_DiffuCoder_Instruct_7B_Lora", "7.6B", 15.2, _APPLE, "Instruct in blocks: fast"
    ),
    KnownModel("dream-base", "Dream-org/Dream-v0-Base-7B", "7.6B", 15.2, _FREE, "general text"),
    KnownModel("dream", "Dream-org/Dream-v0-Instruct-7B", "7.6B", 15.2, _FREE, "general chat"),
    KnownModel("dream-coder", "Dream-org/Dream-Coder-v0-Instruct-7B", "7.6B", 15.2, _FREE, "code chat"),
    KnownModel("dreamon", "Dream-org/DreamOn-v0-7B", "7.6B", 15.2, _FREE, "infills code"),
    KnownModel("dream-reasoner", "Dream-org/DreamReasoner-8B", "8.2B", 16.4, _FREE, "mathematics, long reasoning"),
    KnownModel("open-dcoder", "fredzzp/open-dcoder-0.5B", "0.5B", 1.0, _FREE, "completes and infills code"),
    KnownModel(
        "a2d-coder", "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1", "0.5B", 1.0, _UNKNOWN, "code chat"
    ),
    KnownModel(
        "a2d-coder-block",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
        "0.5B",
        1.0,
        _UNKNOWN,
        "code chat, in blocks",
    ),
    KnownModel("a2d", "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", "0.6B", 1.2, _UNKNOWN, "short chat"),
    KnownModel("a2d-block", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", "0.6B", 1.2, _UNKNOWN, "short chat, in blocks"),
    KnownModel(
        "stable-diffcoder-base", "ByteDance-Seed/Stable-DiffCoder-8B-Base", "8.3B", 16.5, "MIT", "completes code"
    ),
    KnownModel("stable-diffcoder", "ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "8.3B", 16.5, "MIT", "code chat"),
    KnownModel("llada-base", "GSAI-ML/LLaDA-8B-Base", "8.0B", 16.0, "MIT", "general text"),
    KnownModel("llada", "GSAI-ML/LLaDA-8B-Instruct", "8.0B", 16.0, "MIT", "general chat"),
    KnownModel("llada-1.5", "GSAI-ML/LLaDA-1.5", "8.0B", 16.0, "MIT", "general chat, after preference tuning"),
    KnownModel("illada", "GSAI-ML/iLLaDA-8B-Instruct", "8.0B", 16.0, _FREE, "general chat"),
    KnownModel("sdar-1.7b", "JetLM/SDAR-1.7B-Chat", "1.7B", 3.4, _FREE, "chat, in blocks"),
    KnownModel("sdar-4b", "JetLM/SDAR-4B-Chat", "4.0B", 8.0, _FREE, "chat, in blocks"),
    KnownModel("sdar-8b", "JetLM/SDAR-8B-Chat", "8.2B", 16.4, _FREE, "chat, in blocks"),
    KnownModel(
        "trado-4b",
        "Gen-Verse/TraDo-4B-Instruct",
        "4.0B",
        8.0,
        "Apache-2.0 or MIT; see its card",
        "mathematics and code",
    ),
    KnownModel(
        "trado-8b",
        "Gen-Verse/TraDo-8B-Instruct",
        "8.2B",
        16.4,
        "Apache-2.0 or MIT; see its card",
        "mathematics and code",
    ),
    KnownModel("fast-dllm-1.5b", "Efficient-Large-Model/Fast_dLLM_v2_1.5B", "1.5B", 3.1, _FREE, "chat, in blocks"),
    KnownModel("fast-dllm-7b", "Efficient-Large-Model/Fast_dLLM_v2_7B", "7.6B", 15.2, _FREE, "chat, in blocks"),
    KnownModel("coda", "Salesforce/CoDA-v0-Instruct", "1.7B", 3.4, "CC-BY-NC-4.0 (not commercial)", "code chat"),
)


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
    known = {model.name: model.hub_id for model in KNOWN_MODELS} | {"tiny": str(SHIPPED)}
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
        raise CheckpointError(
            f"model {str(source)!r} is not a folder, a Hub id (owner/name) or a name that 'diffucoder models' lists"
        )
    patterns = TEXT_FILES + WEIGHT_FILES if weights else TEXT_FILES
    return _download(hub_id, revision, patterns, fetch=fetch)


def _download(hub_id: str, revision: str | None, patterns: list[str], *, fetch: bool) -> Path:
    """Bring the files of a Hub repository that match `patterns` into the Hub's cache, if they are not there."""
    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, etag_timeout=5, local_files_only=not fetch
        )
        return Path(folder)
    except (errors.HFValidationError, errors.HTTPError, OSError) as error:
        raise CheckpointError(f"model {hub_id!r} {_reason(error, hub_id, revision)}") from error


def _reason(error: Exception, hub_id: str, revision: str | None) -> str:
    """What a download that failed says about the model, and the way out."""
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at https://huggingface.co/{hub_id} and run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is neither a folder here nor on the Hub; check the name, or log in if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; leave it out for the newest"
    if isinstance(error, errors.HFValidationError):
        return "is not a folder and not a valid Hub id; write owner/name"
    return "is not on this machine and the Hub cannot be reached; connect, or give a folder"
