"""EleutherAI's lm-evaluation-harness on this runtime; an optional dependency that only this package imports."""
