"""Everything the package raises on purpose; a room may subclass these (serving.engine: busy, closing, late, failed).

    DiffuCoderError
    ├── ConfigError        a setting, flag or recipe value breaks its rule
    ├── PromptError        a prompt, canvas or hole cannot be decoded
    ├── CheckpointError    a model cannot be found, read or understood
    └── SandboxError       isolation for generated programs cannot be had

A message names the value, the rule it broke and a way out, on one line: the command line prints it as it is and
exits with 2. A generated program that crashes is a result (`ExecutionResult`), never one of these.
"""


class DiffuCoderError(Exception):
    """Base of all errors caused by input or environment rather than by a mistake of ours."""


class ConfigError(DiffuCoderError, ValueError):
    """A setting breaks its rule."""


class PromptError(DiffuCoderError, ValueError):
    """A prompt, canvas or hole cannot be decoded."""


class CheckpointError(DiffuCoderError, OSError):
    """A model cannot be found, read or understood."""


class SandboxError(DiffuCoderError, RuntimeError):
    """Isolation for generated programs cannot be had on this machine."""
