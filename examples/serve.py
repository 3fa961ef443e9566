"""Start the server, and ask it with the `openai` package.

Needs the extra `serve`, and `pip install openai`. In a real setup `diffucoder serve` runs in a terminal of its own.
Prints the answer of the chat and its usage.

Output:
    def solve(n):
        return n * 2

    11 tokens
"""

import re
import subprocess
import sys

from openai import OpenAI

command = [sys.executable, "-m", "diffucoder.cli", "serve", "--port", "0", "--set", "preset=fast"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    lines = iter(server.stderr.readline, "")  # one of them says which free port was taken
    address = next(found[0] for found in (re.search(r"http://[\d.:]+", line) for line in lines) if found)

    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    question = [{"role": "user", "content": "Given a number, double the number."}]
    chat = client.chat.completions.create(model="tiny", messages=question)
    print(chat.choices[0].message.content)
    print(chat.usage.completion_tokens, "tokens")
finally:
    server.terminate()
    server.wait()
    server.stderr.close()
