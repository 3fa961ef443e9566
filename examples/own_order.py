"""Decode with an order of one's own: from left to right.

An order ranks the masked positions, and each step commits those that are due. docs/extend/order.md has a rule of one's
own too. Prints the program, and the share of tokens that went to the leftmost mask.

Output:
    def solve(text):
        return text[::-1]

    global AR-ness 1.0
"""

from dataclasses import replace

import torch
from torch import Tensor

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.policies import Order
from diffucoder.decoding.step import decode
from diffucoder.decoding.trace import global_ar_ness


class LeftToRight(Order):
    def priority(self, confidence: Tensor, uniform: Tensor) -> Tensor:
        return -torch.arange(confidence.shape[1]).expand_as(confidence).float()  # (R, T), larger goes first


coder = DiffuCoder.load()
request = coder.request("Write a function that reverses the string.", DecodingParams())
sequences = request.sequences()
for sequence in sequences:
    sequence.sampler = replace(sequence.sampler, order=LeftToRight())
for _ in decode(coder.model, sequences):
    pass
[answer] = request.results(sequences, seconds=0.0)
print(answer.text)
print("global AR-ness", global_ar_ness(answer.order, 1))
