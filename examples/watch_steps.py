"""Watch a canvas while it is filled in.

Prints the answer after every step. A masked token is a block. Each step commits the tokens that are due, in any order.

Output:
    step  0: 'def░░░░░░░░░░░░░░'
    ...
    step  7: 'def solve(n):\\n    return n * 2\\n'
"""

from diffucoder import DecodingParams, DiffuCoder

coder = DiffuCoder.load()
request = "Given a number, double the number."

for step in coder.stream(request, DecodingParams(steps=8, new_tokens=16)):
    answer = coder.show(step).rpartition("assistant\n")[2]
    print(f"step {step.index:2}: {answer!r}")
