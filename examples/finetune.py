"""Tune the shipped model on two requests of one's own, and ask it for them.

Needs the extra `train`, and takes ten seconds. `diffucoder train sft` runs the same from the command line. Progress
goes to standard error. Prints the answers of the tuned model.

Output:
    Say hello.
    print("hello")

    Say goodbye.
    print("goodbye")
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from diffucoder import DecodingParams, DiffuCoder
from diffucoder.training.settings import SftSettings
from diffucoder.training.sft import sft

ROWS = [
    {"prompt": "Say hello.", "answer": 'print("hello")\n'},
    {"prompt": "Say goodbye.", "answer": 'print("goodbye")\n'},
]

with TemporaryDirectory() as name:
    folder = Path(name)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = SftSettings(
        run=folder / "run", data=(str(data),), cache=folder / "cache", lr=1e-3, steps=50, batch=4, length=48, ramp=0
    )
    tuned = DiffuCoder.load(sft(settings))  # `sft` returns the folder of the finished model
for row in ROWS:
    print(row["prompt"], tuned.generate(row["prompt"], DecodingParams(new_tokens=24)).text, sep="\n")
