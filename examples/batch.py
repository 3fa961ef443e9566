"""Answer several requests in one batch, with several samples of each.

Prints each request, its first answer, and how many of its samples are different texts. An answer depends on its
request, the settings and the seed, and not on the other requests of the batch, apart from rounding.

Output:
    Write a function that takes a string and removes the vowels.
    def solve(text):
        return "".join(c for c in text if c not in "aeiouAEIOU")

    ... of 4 samples differ
    Write a function that takes a list of words and joins the words with dashes.
    def solve(words):
        return "-".join(words)

    ... of 4 samples differ
    Write a function count_words(text) that counts the words in the string.
    def count_words(text):
        return len(text.split())

    ... of 4 samples differ
"""

from diffucoder import DecodingParams, DiffuCoder

REQUESTS = [
    "Write a function that takes a string and removes the vowels.",
    "Write a function that takes a list of words and joins the words with dashes.",
    "Write a function count_words(text) that counts the words in the string.",
]
SAMPLES = 4

params = DecodingParams(num_samples=SAMPLES, temperature=0.7, seed=1)
answers = DiffuCoder.load().generate_batch(REQUESTS, params)  # SAMPLES answers for each request, in order

for index, request in enumerate(REQUESTS):
    texts = [answer.text for answer in answers[index * SAMPLES : (index + 1) * SAMPLES]]
    print(request, texts[0], f"{len(set(texts))} of {SAMPLES} samples differ", sep="\n")
