"""Fill the hole of a file, and write the result beside it.

`infill` takes the text before and after one hole, every character as it is. `length` is in tokens; without it several
lengths are tried. Prints the new file, and the mean log-probability of the tokens in the hole (0 is certain).

Output:
    # Given a number, check whether it is prime.
    def is_prime(n):
        return n > 1 and all(n % i for i in range(2, n))

    mean log-probability -0.00...
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from diffucoder import DiffuCoder

PROGRAM = """\
# Given a number, check whether it is prime.
def is_prime(n):
    return n > 1 and all(n % i??? range(2, n))
"""

with TemporaryDirectory() as folder:
    draft = Path(folder, "draft.py")
    draft.write_text(PROGRAM)

    before, after = draft.read_text().split("???")
    middle = DiffuCoder.load().infill(before, after, length=3)

    finished = Path(folder, "finished.py")
    finished.write_text(before + middle.text + after)
    print(finished.read_text())
    print(f"mean log-probability {middle.trace.mean_log_prob - 1e-9:.4f}")
