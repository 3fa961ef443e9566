"""Decoding: canvases in, `Step`s out, in any order.

For: choosing which masked positions to commit, with which tokens, and watching it happen.
Not for: what a forward pass is (`models`), or losses (`diffusion`).

Data flows one way: `Request` → `Sequence`s → `advance`, the only decoding step there is → `Step`s and results.
To add an order or a rule: a class in `policies` and a name in `params`; a cache: the same in `caching`.
"""
