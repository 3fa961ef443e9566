"""How good a model is: benchmarks, their rules, and the numbers made of them. Generated programs run in `grading`."""
