"""What a server is told when it starts. No torch: `diffucoder serve --help` answers at once."""

import re
from typing import Literal

from pydantic import Field, field_validator

from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams


class EngineSettings(Settings):
    """How much an engine takes on."""

    max_batch: int = Field(default=16, ge=1, description="rows in one forward pass")
    max_waiting: int = Field(default=64, ge=0, description="requests that may wait for a place; more are refused")
    max_rows: int = Field(default=64, ge=1, description="rows of one request: samples, times lengths tried")
    deadline: float = Field(default=300.0, gt=0, description="seconds until a request is given up")
    turn: int = Field(default=64, ge=1, description="steps until a row gives way to those who wait")
    reuse: int = Field(
        default=0,
        ge=0,
        description="answers whose keys and values are kept for requests that begin alike, with cache=delayed",
    )


class ServerSettings(Settings):
    """What a server is told when it starts."""

    api_key: str | None = Field(
        default=None, min_length=8, description="what clients must send; anyone may if left out"
    )
    cors: tuple[str, ...] = Field(default=(), description="origins whose pages may ask")
    max_body: int = Field(default=2**20, ge=1024, description="bytes of a request")
    decoding: DecodingParams = Field(default_factory=DecodingParams, description="where requests say nothing else")
    engine: EngineSettings = Field(default_factory=EngineSettings)


class ScaleSettings(ServerSettings):
    """What many replicas of a server are told: they load the model themselves."""

    model: str | None = Field(default=None, description="folder, hub id or known name; the shipped one if left out")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = Field(
        default=None, description="of the weights; what is fast there if left out"
    )
    device: str | None = Field(default=None, description="cpu, cuda, mps; the best there is if left out")
    replicas: str = Field(default="1", description="how many; MIN:MAX: as many as the load asks for")
    cpus: int | None = Field(default=None, ge=0, description="cores of a replica; an equal share of those here")
    gpus: float | None = Field(default=None, ge=0, description="GPUs of a replica; an equal share of those here")

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_bounds(cls, given: object) -> str:
        found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", str(given))
        if not found or int(found[1]) > int(found[2] or found[1]):
            raise ValueError("write a number, or MIN:MAX as in 1:4")
        return str(given)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most replicas."""
        least, _, most = self.replicas.partition(":")
        return int(least), int(most or least)
