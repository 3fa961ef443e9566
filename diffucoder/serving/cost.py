"""What a request costs at most: passes, positions and memory. A request that is over a limit of the server is rejected.

The one place that estimates this. Not for: who is computed when (`jobs`).
"""

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffucoder.decoding.params import DecodingParams
from diffucoder.decoding.requests import Request
from diffucoder.errors import CheckpointError, ConfigError
from diffucoder.serving.settings import EngineSettings

_KEPT = 250  # bytes that a position of a row keeps until its request is answered: a sequence's tensors, a trace's lists
_REVOKED = 200  # bytes of a commitment that was taken back, in the trace
_LOGIT = 24  # bytes of a logit, with what sampling makes of it
_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


class Cost(NamedTuple):
    """The most that a request can take."""

    rows: int
    positions: int  # of the longest row
    passes: int
    kept: int  # bytes, from its acceptance to its end
    passing: int  # bytes, during a pass

    @property
    def computed(self) -> int:
        """Positions that all passes compute."""
        return self.rows * self.positions * self.passes

    @property
    def memory(self) -> int:
        """Bytes."""
        return self.kept + self.passing


class Budget:
    """What a server can spend on a request."""

    def __init__(self, model: Any, settings: EngineSettings) -> None:  # Any: a Denoiser, or a stand-in
        """Read the limits: those of `settings`, where it has them, else what model and machine allow."""
        self.model = model
        self.settings = settings
        self.without_cache: CheckpointError | None = None  # why the model has no cache
        self._cached = 0  # bytes of a position's keys and values in all layers
        try:
            for layer in model.cache.keys:  # (P, S, heads, D)
                self._cached += 2 * layer.shape[-2:].numel() * layer.itemsize
        except CheckpointError as error:
            self.without_cache = error
        # larger passes hardly compute more positions a second, and a newcomer waits for the end of one
        self.positions = settings.max_positions or (1024 if model.device.type == "cpu" else 8192)  # of a pass
        self.passes: int = model.max_length
        self.computed = settings.max_computed or settings.max_rows * self.passes**2
        self.memory = settings.max_memory or max(
            free_memory(model.device) // 2, self.cost(1, self.passes, self.passes, DecodingParams()).memory
        )

    def cost_of(self, request: Request) -> Cost:
        """Estimate what decoding `request` takes."""
        rows, positions = request.canvas.tokens.shape
        masks = request.canvas.masked.sum(-1)  # (rows,)
        masked = int(masks.max())
        resize = request.canvas.resize
        if resize is None:
            return self.cost(rows, positions, masked, request.params)
        # Each pass may make a hole longer, and then fill it: its steps begin again
        positions += max(0, resize.most - int(masks.min()))
        return self.cost(rows, positions, masked + 2 * resize.most, request.params.replace(steps=None))

    def cost(self, rows: int, positions: int, masked: int, params: DecodingParams) -> Cost:
        """Estimate what decoding so many rows takes, of at most so many positions, `masked` of them masked."""
        passes = masked if params.revoke else params.steps or masked  # what is revoked takes further steps
        if params.preset != "reference":  # which takes all its steps
            passes = min(passes, masked)
        kept = rows * positions * _KEPT
        if params.revoke:  # a step commits more than it revokes
            kept += int(rows * min(masked / (1 - params.revoke), masked**2 / 2) * _REVOKED)
        together = min(rows, self.settings.max_batch)
        if params.cache != "none":
            kept += 2 * together * positions * self._cached  # while a cache grows, it is there twice
        together = max(1, min(together, self.positions // positions))
        config = self.model.config
        hidden = (8 * config.hidden_size + 4 * config.intermediate_size) * self.model.dtype.itemsize
        logits = min(together * positions * self.model.vocab_size, self.model.chunk_elements)
        passing = together * positions * hidden + _LOGIT * logits
        if params.preset == "reference":  # whose attention has a mask of queries times keys
            passing += 8 * together * positions**2
        return Cost(rows, positions, passes, kept, passing)

    def check(self, cost: Cost, params: DecodingParams) -> None:
        """Raise an error for a request over a limit, with the estimate, the limit and what to ask less of."""
        size = f"{cost.rows} rows of {cost.positions:,} positions"
        if params.cache != "none" and self.without_cache is not None:
            raise self.without_cache
        if cost.passes > self.passes:
            raise ConfigError(
                f"it takes {cost.passes:,} passes, and the limit is the model's context, {self.passes:,}; "
                "ask for fewer steps"
            )
        if cost.computed > self.computed:
            raise ConfigError(
                f"{size} in {cost.passes:,} passes compute up to {cost.computed:,} positions, and the limit is "
                f"{self.computed:,} (max_computed); ask for fewer answers, tokens or steps"
            )
        if cost.memory > self.memory:
            raise ConfigError(
                f"{size} take up to {cost.memory / 2**20:,.0f} MiB, and the limit is {self.memory / 2**20:,.0f} MiB "
                "(max_memory); ask for fewer answers or tokens, less revoke, or no cache"
            )


def free_memory(device: torch.device) -> int:
    """Bytes that are free where a model computes: on its GPU, else in the machine and in this container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 2**63
    with suppress(OSError, StopIteration):  # not Linux
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    for limit, usage in _CGROUPS:
        with suppress(OSError, ValueError):  # other version, or no limit ("max")
            most, used = (int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")) for name in (limit, usage))
            free = min(free, most - used)
    return max(0, free)
