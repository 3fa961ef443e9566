"""Run folders: the settings of a run, so that it is only continued with the same ones."""

import hashlib
import json
import re
from pathlib import Path

from diffucoder.decoding.params import DecodingParams
from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.files import Json, open_file, read_json, write_json
from diffucoder.models.hub import TEXT_FILES, WEIGHT_FILES, find

KEY_VERSION = 2  # raise it when a setting, or its default, changes its meaning: older runs are not continued then


def run_key(settings: Json) -> Json:
    """Return the settings that identify a run; of decoding, only those that differ from their defaults.

    So runs that were begun before a decoding setting existed can be continued.
    """
    key = {"version": KEY_VERSION, **settings}
    if "params" in settings:
        defaults = DecodingParams().model_dump(mode="json")
        key["params"] = {name: value for name, value in settings["params"].items() if value != defaults[name]}
    return key


def default_folder(parent: Path, settings: Json) -> Path:
    """Return the folder of a run, named after its settings."""
    content = json.dumps(run_key(settings), sort_keys=True)
    return parent / f"{Path(settings['benchmark']).stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def open_run_folder(folder: Path, key: Json) -> None:
    """Make the folder of a run, or continue in it. Raises ConfigError if it is unusable or belongs to another run."""
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, key)
        present = read_json(path)
    except OSError as error:
        raise ConfigError(f"run folder {str(folder)!r} cannot be used ({error.strerror}); give another --run") from None
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} cannot be read ({error}); remove it, or give another --run") from None
    for name in dict.fromkeys([*key, *present]):
        if present.get(name) != key.get(name):
            raise ConfigError(
                f"run folder {str(folder)!r} belongs to {name}={repr(present.get(name))[:200]}, not {key.get(name)!r}; "
                "give another --run, or the same settings to continue"
            )


def content_hash(path: Path) -> str:
    """Return a hash of a file. Raises ConfigError if it cannot be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"file {str(path)!r} cannot be read ({error.strerror}); check the path") from None


def weights_hash(source: str | None) -> str:
    """Return a hash of all files that decide what a model answers: weights, config and tokenizer, every byte.

    None is the shipped model. Of a Hub model the commit counts. Raises CheckpointError if there is no model.
    """
    folder = find(source, weights=True)
    in_hub_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    if in_hub_cache and re.fullmatch("[0-9a-f]{40}", folder.name):
        return folder.name[:16]
    digest = hashlib.sha256()
    paths = {path for pattern in TEXT_FILES + WEIGHT_FILES for path in folder.glob(pattern)}
    for path in sorted(paths):
        if not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; fetch it again")
        digest.update(f"{path.name}:{content_hash(path)}\n".encode())
    return digest.hexdigest()[:16]
