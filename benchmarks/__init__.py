"""Public benchmarks with the numbers of lm-evaluation-harness.

    items      what a question is, and what a model said to it
    metrics    what an answer is worth, with formulas.py for answers that are formulas
    tasks      one record per benchmark: how its rows become questions, and which metrics count
    texts      the fixed words of their prompts
    reading    files to items
    questions  items to questions with demonstrations, questions to token ids
    trees      the choices of one question as branches of one row
    engine     a model that is asked: scores, texts, verdicts on programs
    sandbox    programs run with their tests, in two processes (checking), confined (confined)
    asking     a task's questions through an engine
    results    from values to means, errors, and changes between models
    report     the tables and the files
    command    `eval.py run`

A benchmark of your own is one record in tasks.py, or no code at all: a file of
{query, choices, gold}.
"""
