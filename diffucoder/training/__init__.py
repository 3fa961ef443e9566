"""Training: the stages of the paper, each a function of its settings; `trainer` runs them all."""
