"""Models: the `Denoiser` everything else talks to, and checkpoints in and out.

For: turning any supported causal language model into a bidirectional denoiser, and reading and writing it on disk.
Not for: choosing tokens (`decoding`), losses (`diffusion`, `training`) or text (`tokenizer`).
"""
