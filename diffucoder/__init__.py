"""DiffuCoder: masked-diffusion language models that write code in any order.

The public names are loaded on first use (PEP 562), so that `import diffucoder`, `diffucoder --help` and the sandbox
start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers read these, and not `_HOME`
    from diffucoder.decoding.canvas import Canvas as Canvas
    from diffucoder.decoding.coder import DiffuCoder as DiffuCoder
    from diffucoder.decoding.params import DecodingParams as DecodingParams
    from diffucoder.decoding.requests import Generation as Generation
    from diffucoder.decoding.step import Step as Step
    from diffucoder.decoding.step import denoise as denoise
    from diffucoder.errors import DiffuCoderError as DiffuCoderError
    from diffucoder.models.checkpoint import load_denoiser as load_denoiser
    from diffucoder.models.denoiser import Denoiser as Denoiser

__version__ = "0.1.0"

_HOME = {
    "Canvas": "diffucoder.decoding.canvas",
    "DecodingParams": "diffucoder.decoding.params",
    "Denoiser": "diffucoder.models.denoiser",
    "DiffuCoder": "diffucoder.decoding.coder",
    "DiffuCoderError": "diffucoder.errors",
    "Generation": "diffucoder.decoding.requests",
    "Step": "diffucoder.decoding.step",
    "denoise": "diffucoder.decoding.step",
    "load_denoiser": "diffucoder.models.checkpoint",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:  # Any: a module attribute may be of any type (PEP 562)
    if name not in _HOME:
        raise AttributeError(f"module 'diffucoder' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
