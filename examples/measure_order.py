"""Measure the order in which the model writes.

Local AR-ness is the share of tokens that follow the one that was committed just before. Global AR-ness is the share
that go to the leftmost mask. Both are 1 for a model that writes from left to right. Prints them for three temperatures.

Output:
    temperature 0.0: local ..., global ...
    temperature 0.7: local ..., global ...
    temperature 1.2: local ..., global ...
"""

from statistics import mean

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.decoding.trace import global_ar_ness, local_ar_ness

REQUESTS = [
    "Write a function that takes a string and removes the vowels.",
    "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers.",
    "Given a number, check whether it is prime.",
]

coder = DiffuCoder.load()
for temperature in (0.0, 0.7, 1.2):
    answers = coder.generate_batch(REQUESTS, DecodingParams(temperature=temperature))
    # keep the tokens of the answers, leave out the padding after them
    orders = [[at for at in answer.order if at < len(answer.tokens)] for answer in answers]
    local = mean(local_ar_ness(order, 1) for order in orders)
    overall = mean(global_ar_ness(order, 1) for order in orders)
    print(f"temperature {temperature}: local {local:.2f}, global {overall:.2f}")
