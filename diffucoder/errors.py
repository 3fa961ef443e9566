"""Everything the package raises on purpose. `serving.engine` has subclasses of its own.

A message is one line: the value, the rule it broke and a way out. The command line prints it and exits with 2.
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
