"""Write parts of a program again, and leave the rest as it is.

A span has the first and last character of what is replaced, and the number of tokens to write. Prints the edited
program and what the span became.

Output:
    # Write a function fibonacci(n) that computes the nth Fibonacci number.
    def fibonacci(n):
        a, b = 0, 1
        for _ in range(n):
            a, b = b, a + b
        return a

    (' b, a + b',)
"""

from diffucoder import DiffuCoder
from diffucoder.decoding.coder import Span

PROGRAM = """\
# Write a function fibonacci(n) that computes the nth Fibonacci number.
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = a, b
    return a
"""

start = PROGRAM.rindex(" a, b\n")
edited = DiffuCoder.load().edit(PROGRAM, [Span(start, start + len(" a, b"), tokens=5)])
print(edited.text)
print(edited.pieces)
