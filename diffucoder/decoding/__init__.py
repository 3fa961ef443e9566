"""Decoding: canvases in, `Step`s out, in any order.

For: choosing which masked positions to commit, with which tokens, and watching it happen.
Not for: what a forward pass is (`models`), or losses (`diffusion`).

Data flows one way: `Canvas` → `denoise` → `Step`s. `denoise` loops over `advance`, the only decoding step there is.
To add a policy: a name in `params.POLICIES`, its confidence in `sampling`, or its choice of positions in `policies`.
"""
