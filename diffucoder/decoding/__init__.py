"""Decoding: canvases in, `Step`s out, in any order.

Data flows one way: `Request` → `Sequence`s → `advance`, the only decoding step there is → `Step`s and results.
"""
