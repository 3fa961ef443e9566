"""What a run wrote, for people: samples.jsonl has completions and verdicts, traces.jsonl how the latest were decoded.

`diffucoder order --traces RUN` draws the latter on a page, with the verdicts of verdicts.jsonl.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffucoder.decoding.trace import write_traces
from diffucoder.files import append_jsonl, write_jsonl
from diffucoder.tokenizer import Tokenizer
from diffucoder.training.rollouts import Completion


def write_samples(
    run: Path, step: int, completions: Sequence[Completion], advantages: Sequence[float], tokenizer: Tokenizer
) -> None:
    """Write the completions that `step` is the first to learn from."""
    lines, traces, verdicts = [], [], []
    for number, (completion, advantage) in enumerate(zip(completions, advantages, strict=True)):
        exercise = completion.exercise
        trace = completion.generation.trace
        tokens = trace.tokens[trace.prompt_length :][: completion.length]
        line = {
            "step": step,
            "id": exercise.id,
            "prompt": exercise.prompt,
            "completion": completion.generation.text,
            "status": completion.reward.status,
            "detail": completion.reward.detail,
            "advantage": round(advantage, 6),
            "forward_passes": completion.generation.forward_passes,
            "tokens": [tokenizer.decode([token], skip_special=False) for token in tokens],
            "steps": trace.steps[: completion.length],
        }
        for name, value in completion.figures.items():
            line[name] = None if math.isnan(value) else round(value, 6)  # JSON has no nan
        lines.append(line)
        traces.append(replace(trace, id=f"{exercise.id}#{number}"))
        verdicts.append({"task_id": exercise.id, "sample": number, "passed": completion.reward.solved})
    append_jsonl(run / "samples.jsonl", lines)
    write_traces(run / "traces.jsonl", traces)
    write_jsonl(run / "verdicts.jsonl", verdicts)
