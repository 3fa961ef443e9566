"""What a server is told when it starts. No torch: `diffucoder serve --help` answers at once."""

from pydantic import Field

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
