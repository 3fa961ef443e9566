"""Weights in safetensors files: which tensors there are, whether they fit a config and the memory, reading them.

For: looking at headers before anything is allocated. Not for: writing weights (`checkpoint`), GGUF (`gguf`).
The files are found and read here, and transformers gets tensors: it would read other files of the folder too.
transformers is imported late, since it takes seconds.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffucoder.errors import CheckpointError
from diffucoder.model_files import is_regular, one_line, read_json, shown
from diffucoder.models.families import Published

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
_STORED_DTYPES = ("F32", "BF16", "F16", "F64")  # as safetensors calls them
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and its shape."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]


def load_causal_lm(
    folder: Path, config: Any, published: Published, *, dtype: torch.dtype, device: torch.device
) -> Any:  # Any: mypy does not follow transformers
    """The model of `config` with the weights in `folder`, on `device`.

    CheckpointError if the files do not hold exactly its weights, or it needs more memory than there is.
    """
    with transformers_silenced():
        stored = _check_weights(folder, config, published)
    numbers = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    check_memory(numbers * dtype.itemsize, device, f"{folder} as {str(dtype).removeprefix('torch.')}")
    try:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        with transformers_silenced():
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=read_tensors(stored), dtype=dtype, attn_implementation="sdpa"
            )
            if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
                model.config.tie_word_embeddings = False  # both are stored, whatever the config says
            model.to(device)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({one_line(error)})") from error
    model.name_or_path = model.config.name_or_path = str(folder)
    return model.eval()


def weight_names(folder: Path) -> frozenset[str]:
    """The names of the weights in `folder`; none if they are not there, or damaged, as loading will say."""
    try:
        return frozenset(stored_tensors(folder, _file_names(folder)))
    except CheckpointError:
        return frozenset()


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of the model that a transformers config describes, by name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), transformers_silenced():  # takes no memory
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_memory(needed: int, device: torch.device, subject: str) -> None:
    """CheckpointError if `needed` bytes are more than are free on `device`."""
    free = _free_memory(device)
    if needed > free:
        sizes = f"needs {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free on {device}"
        raise CheckpointError(f"{subject} {sizes}; use a smaller dtype or another machine")


def _check_weights(folder: Path, config: Any, published: Published) -> dict[str, Stored]:
    """The stored weights by transformers' names; CheckpointError unless they are exactly those that `config` describes.

    Reads headers only.
    """
    family = published.family
    present = stored_tensors(folder, _file_names(folder))
    if config.num_hidden_layers > len(present):  # checked first, because layers are made one by one
        layers = f"num_hidden_layers={config.num_hidden_layers}"
        raise CheckpointError(f"{folder}/config.json has {layers}, but there are {len(present)} weights")
    stored: dict[str, Stored] = {}
    for name, tensor in present.items():
        if name.endswith("rotary_emb.inv_freq"):  # a buffer of old checkpoints, which follows from the config
            continue
        ours = family.weight_name(name)
        if ours in stored:
            both = f"{one_line(stored[ours].name)} and {one_line(name)}, one weight of {family.title}"
            raise CheckpointError(f"{folder} has {both}; remove one")
        stored[ours] = tensor
    if "lm_head.weight" not in stored and published.fields.get(published.key("tie_word_embeddings")) is None:
        config.tie_word_embeddings = True  # what transformers' configs once meant by leaving the key out
    try:
        expected = expected_shapes(config)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}/config.json describes an impossible model: {one_line(error)}") from error
    missing = expected.keys() - stored.keys()
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")  # one matrix, stored once
    unexpected = stored.keys() - expected.keys()
    shapes = [(name, stored[name].shape, expected[name]) for name in expected.keys() & stored.keys()]
    wrong = [f"{name} {found} instead of {right}" for name, found, right in shapes if found != right]
    problems = {"lacks": missing, "has unexpected": unexpected, "has wrong shapes for": wrong}
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            first = one_line(family.stored_name(min(names)))
            raise CheckpointError(
                f"{folder} {problem} {first}{more}; config.json and weights do not match, nearest is {family.title}"
            )
    return stored


def stored_tensors(folder: Path, file_names: Iterable[str]) -> dict[str, Stored]:
    """All tensors in safetensors files of the folder. CheckpointError if a file is missing or damaged."""
    tensors: dict[str, Stored] = {}
    for file_name in sorted(file_names):
        path = folder / file_name
        try:
            if not is_regular(path):
                raise CheckpointError(f"{folder} lacks weight file {path.name}; fetch it again (safetensors only)")
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a dict
                    tensor = file.get_slice(name)
                    kind = tensor.get_dtype()
                    if kind not in _STORED_DTYPES:
                        raise CheckpointError(
                            f"{path}: {one_line(name)} is {kind}, quantised; use the model with dense weights"
                        )
                    if name in tensors:
                        other = tensors[name].path.name
                        raise CheckpointError(f"{path}: {one_line(name)} is in {other} too; fetch both again")
                    tensors[name] = Stored(path, name, tuple(tensor.get_shape()))
        except CheckpointError:
            raise
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); fetch it again") from error
    return tensors


def _file_names(folder: Path) -> set[str]:
    """The names of the folder's weight files: one, or those that its index lists."""
    if os.path.lexists(folder / WEIGHTS) or not (folder / INDEX).exists():
        return {WEIGHTS}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; fetch it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder / INDEX} names {shown(name)}, which is not a .safetensors file of the folder"
            )
    return set(weight_map.values())


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on `device`, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
        return sizes["MemAvailable"] + sizes["SwapFree"]
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_tensors(stored: dict[str, Stored]) -> dict[str, Tensor]:
    """The tensors, mapped from their files: read when they are used."""
    state = {}
    for path in {tensor.path for tensor in stored.values()}:
        with safe_open(path, framework="pt") as file:
            for name, tensor in stored.items():
                if tensor.path == path:
                    state[name] = file.get_tensor(tensor.name)
    return state


@contextmanager
def transformers_silenced() -> Iterator[None]:
    """Keep transformers' progress bar and reports out of our output: we check what they report."""
    from transformers.utils import logging as transformers_logging

    shows_bar = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bar:
            transformers_logging.enable_progress_bar()
