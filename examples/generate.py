"""Answer a request with the model that ships in the package.

Prints the program, the number of forward passes, and why the answer ended ("stop": the model ended it).

Output:
    def filter_numbers(nums):
        nums = [n for n in nums if n % 2 == 0]
        return sum(nums)

    64 passes, stop
"""

from diffucoder import DiffuCoder

coder = DiffuCoder.load()  # or a folder, a Hub id, or a name that `diffucoder models` lists
answer = coder.generate(
    "Write a function filter_numbers(nums) that keeps only the even numbers, then sums the numbers."
)

print(answer.text)
print(f"{answer.forward_passes} passes, {answer.finish_reason}")
