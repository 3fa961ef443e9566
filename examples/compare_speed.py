"""Compare settings that need fewer forward passes.

Prints for each setting the number of forward passes, the tokens that each wrote, and whether the answer is the same.
Other requests lose a little: docs/decoding.md has the measured losses.

Output:
    one token a pass         63 passes   0.32 tokens each, same answer
    a quarter of the steps   16 passes   1.25 tokens each, same answer
    certain tokens at once   ... passes ... tokens each, same answer
    preset fast              ... passes ... tokens each, same answer
"""

from diffucoder import DecodingParams, DiffuCoder

SETTINGS = {
    "one token a pass": DecodingParams(),
    "a quarter of the steps": DecodingParams(steps=16),
    "certain tokens at once": DecodingParams(threshold=0.9),
    "preset fast": DecodingParams(preset="fast"),
}

coder = DiffuCoder.load()
first = None
for name, params in SETTINGS.items():
    answer = coder.generate("Write a function that takes a string and removes the vowels.", params)
    first = first or answer.text
    same = "same answer" if answer.text == first else "another answer"
    print(f"{name:<24}{answer.forward_passes:3} passes {answer.tokens_per_forward:6.2f} tokens each, {same}")
