"""Settings of a server. No torch: `diffucoder serve --help` answers at once."""

import re
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from diffucoder.config import Settings
from diffucoder.decoding.params import DecodingParams


class EngineSettings(Settings):
    """Limits of the engine."""

    max_batch: int = Field(default=16, ge=1, description="rows in one forward pass")
    max_waiting: int = Field(default=64, ge=0, description="requests beyond max_batch; more are rejected")
    max_rows: int = Field(default=64, ge=1, description="rows of one request: answers times the lengths tried")
    deadline: float = Field(default=300.0, gt=0, description="seconds until a request is ended with an error")
    max_positions: int | None = Field(
        default=None,
        ge=1,
        description="rows of one forward pass times the longest of them; a longer row goes alone; "
        "if left out, 1024 on CPUs and 8192 elsewhere",
    )
    max_computed: int | None = Field(
        default=None, ge=1, description="rows x positions x passes of a request; if left out, max_rows whole contexts"
    )
    max_memory: int | None = Field(
        default=None, ge=1, description="bytes that requests may take; if left out, half of the free memory"
    )


class ServerSettings(Settings):
    """Settings of one server."""

    model_config = ConfigDict(hide_input_in_errors=True)  # Ray validates too, and the key is no text for its log

    api_key: str | None = Field(default=None, repr=False, description="key that clients must send; if left out, no key")
    hosts: tuple[str, ...] = Field(default=(), description="allowed in Host headers, with loopback; a key allows all")
    cors: tuple[str, ...] = Field(default=(), description="allowed CORS origin")
    max_body: int = Field(default=2**20, ge=1024, description="largest request body in bytes")
    max_connections: int | None = Field(
        default=None,
        ge=8,
        description="open connections, at most half the descriptors; one more closes the one that has waited longest;"
        " if left out, 512, or twice the requests that run and wait",
    )
    read_timeout: float = Field(default=20.0, gt=0, description="seconds for a client to send a head, then a body")
    write_timeout: float = Field(default=30.0, gt=0, description="seconds for a client to read what is sent")
    run_tests: bool = Field(default=False, description="run programs of /v1/repair in the sandbox, against their tests")
    decoding: DecodingParams = Field(default_factory=DecodingParams, description="defaults of requests")
    engine: EngineSettings = Field(default_factory=EngineSettings)

    @field_validator("api_key")
    @classmethod
    def _check_key(cls, key: str | None) -> str | None:
        """Reject keys that no client could send or anyone could guess. No message has the key."""
        if key is None:
            return None
        key = key.strip("\ufeff \t\r\n")
        if not 8 <= len(key) <= 512:
            raise ValueError(f"the key has {len(key)} characters; use 8 to 512, such as those of openssl rand -hex 32")
        if not re.fullmatch("[!#-&(-~]+", key):
            raise ValueError("the key has a space, a quote, a line end or a character beyond ASCII; leave it out")
        return key

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[\w.-]+|[\da-f:.]+(%\w+)?", host, re.IGNORECASE):
                raise ValueError(f"{host!r} is not a name or address; leave out scheme, port and brackets")
        return tuple(map(str.lower, hosts))


class ScaleSettings(ServerSettings):
    """Settings of a server with many replicas. Each replica loads the model."""

    model: str | None = Field(default=None, description="folder, Hub id or known name; if left out, the shipped model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="dtype of the weights; if left out, the fastest on the device"
    )
    device: str | None = Field(default=None, description="cpu, cuda or mps; if left out, the best available")
    replicas: str = Field(default="1", description="number of replicas, or MIN:MAX to follow the load")
    cpus: int | None = Field(default=None, ge=0, description="cores of a replica; if left out, an equal share")
    gpus: float | None = Field(default=None, ge=0, description="GPUs of a replica; if left out, an equal share")

    @field_validator("replicas", mode="before")
    @classmethod
    def _check_replicas(cls, value: object) -> str:
        bounds = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", str(value))
        if not bounds or int(bounds[1]) > int(bounds[2] or bounds[1]):
            raise ValueError("write a number, or MIN:MAX as in 1:4")
        return str(value)

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most replicas."""
        least, _, most = self.replicas.partition(":")
        return int(least), int(most or least)
