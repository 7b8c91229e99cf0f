"""Statistics, head to head, report, page, speaking with a model: what eval.py is made of."""
