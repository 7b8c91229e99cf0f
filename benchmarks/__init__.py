"""Public benchmarks with the numbers of lm-evaluation-harness: questions, engine, task records, sandbox."""
