"""Fill several holes of a program jointly.

A hole is `<|hole:7|>` for 7 tokens, or `<|hole|>` for a length that the model chooses. The shipped model needs the
request above the program, as a comment. Prints the program, and the text of each hole.

Output:
    # Write a function total(nums) that keeps only the even numbers, then sums the numbers.
    def total(nums):
        nums = [n for n in nums if n % 2 == 0]
        return sum(nums)

    (' n % 2 == 0', ' sum')
"""

from diffucoder import DiffuCoder

PROGRAM = """\
# Write a function total(nums) that keeps only the even numbers, then sums the numbers.
def total(nums):
    nums = [n for n in nums if<|hole:7|>]
    return<|hole:1|>(nums)
"""

filled = DiffuCoder.load().fill(PROGRAM)
print(filled.text)
print(filled.pieces)
