"""Measure models on benchmarks: tasks, samples, verdicts, reports. `run.evaluate` does all of it."""
