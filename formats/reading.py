"""Examples to records: what each stage takes, and what is reported of the rest."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from formats.parsers import END_AS_TEXT, TEMPLATE_MARKS, Example, contradict, parse_example
from formats.records import (
    BadRow,
    Dialogue,
    Message,
    Prompt,
    Ranking,
    Record,
    Report,
    Uninformative,
)
from formats.rows import Watched, parse_row, read_rows

Make = Callable[[Example, str], Record]     # (example, source) -> the record of one stage


# ------------------------------------------------------------------------------------------
# What each stage takes

def to_dialogue(example: Example, source: str) -> Dialogue:
    """Keep what a demonstration is: one answer, that nobody marked as bad."""
    if example.flaw:
        raise Uninformative(example.flaw)
    if example.ranks is not None:
        raise BadRow("a comparison, not a demonstration; it serves the reward model")
    if not example.responses and any(turn.role == "assistant" for turn in example.prompt):
        return Dialogue(example.prompt[:-1], source)  # it ends with a question: without that one
    if not example.responses:
        raise BadRow("no answer to learn from: no field has it, or the dialogue ends with the user")
    if len(example.responses) > 1:
        raise BadRow("several answers that nobody ranked; keep one")

    [answer] = example.responses
    if not answer.strip():
        raise BadRow("empty answer")
    return Dialogue((*example.prompt, Message("assistant", answer)), source)


def to_ranking(example: Example, source: str) -> Ranking:
    """Keep what a reward model can learn from: two different responses or more, not all tied."""
    if example.flaw:
        raise Uninformative(example.flaw)
    if example.ranks is None:
        raise BadRow("nothing is compared: no 'chosen' and 'rejected', no 'ranks', no 'scores'")

    # Responses that differ in spaces at their borders alone are equal to every reader.
    texts = {text.strip() for text in example.responses}
    if len(example.responses) < 2:
        raise Uninformative("one response")
    if len(set(example.ranks)) == 1:
        raise Uninformative("all tied")
    if len(texts) == 1:
        raise Uninformative("responses are equal")

    # As many (text, rank) pairs as texts, or one text has two ranks. To an annotator who is a
    # program spaces are a difference, so here they are one.
    if len(set(zip(example.responses, example.ranks))) > len(set(example.responses)):
        raise BadRow("equal responses with different ranks")
    return Ranking(example.prompt, example.responses, example.ranks, source)


def to_prompt(example: Example, source: str) -> Prompt:
    """Keep the prompt, and its answer if there is just one that nobody compared."""
    # One of several samples is no reference: nobody said that it is right.
    has_answer = example.ranks is None and len(example.responses) == 1
    return Prompt(example.prompt, source, example.responses[0] if has_answer else None)


# ------------------------------------------------------------------------------------------
# Files

def without_ends(example: Example) -> Example:
    """Take control tokens that stand as text at the end of answers off: they would stay text."""
    prompt = tuple(Message(turn.role, END_AS_TEXT.sub("", turn.content))
                   if turn.role == "assistant" else turn for turn in example.prompt)
    responses = tuple(END_AS_TEXT.sub("", text) for text in example.responses)
    return example._replace(prompt=prompt, responses=responses)


def notes_on(record: Record, example: Example, given: Example) -> Iterator[str]:
    """Yield what a reader of the report should know about a record that is kept.

    given: the example as the file has it.
    """
    if example != given:
        yield "with a control token as text at the end of an answer, taken off"
    if isinstance(record, Dialogue) and not example.responses:
        yield "ends with the user: its last question left out"
    texts = [message.content for message in record.messages]
    if record.messages[0].role == "raw":
        yield "already in a template, left as they are"
    elif any(mark in text for text in texts for mark in TEMPLATE_MARKS):
        yield "with a template's marks in the text"
    if isinstance(record, Ranking) and not all(text.strip() for text in record.responses):
        yield "with an empty response"


def stream_file(
    path: str | Path, make: Make, skip_bad: bool, report: Report
) -> Iterator[Record]:
    """Yield a file's usable rows as records, and fill its report.

    ValueError for the first bad row (unless skip_bad), and if no row is usable.
    """
    for source, raw in read_rows(path):
        try:
            row = Watched(parse_row(raw))
            given = list(parse_example(row))
            examples = [without_ends(example) for example in given]
            made = [make(example, source) for example in examples]
        except Uninformative as reason:
            report.skip(str(reason), source)
        except BadRow as fault:
            if not skip_bad:
                advice = "mend the row, or leave such rows out with --data.skip_bad"
                raise ValueError(f"{source}: {fault}; {advice}") from None
            report.skip(fault.reason, source)
        else:
            for name in row.unread_texts:
                report.note(f"with a text that nothing here reads, '{name}'", source)
            # One row may give several records (self-instruct's instances): those are counted.
            for record, example, as_given in zip(made, examples, given):
                report.keep()
                for note in notes_on(record, example, as_given):
                    report.note(note, source)
            yield from made
    report.require_rows(str(path), "check that the file suits this stage")


def stream_files(
    paths: Sequence[str | Path], make: Make, skip_bad: bool, total: Report
) -> Iterator[Record]:
    """Yield the records of files in order, and fill a report, with what occurs more than once."""
    # Duplicates stay: to repeat a row is a common way to give it weight. But it is said. Of the
    # records themselves only a hash of 64 bits is kept, or this would hold all of the files.
    seen: set[int] = set()
    judged: dict[Any, Any] = {}
    repeats = Report()
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        report = Report()
        for record in stream_file(path, make, skip_bad, report):
            content = hash(replace(record, source=""))
            if content in seen:
                repeats.note("exact duplicates", record.source)
            elif disagrees(record, judged):
                repeats.note("contradict another row", record.source)
            seen.add(content)
            yield record
        total.add(report)
    total.add(repeats)


def read_files(
    paths: Sequence[str | Path], make: Make, skip_bad: bool
) -> tuple[list[Any], Report]:
    """Read files in order, and count what occurs more than once in them."""
    report = Report()
    return list(stream_files(paths, make, skip_bad, report)), report


def disagrees(record: Record, judged: dict[Any, Any]) -> bool:
    """Whether a row says the opposite of an earlier one: of the same responses, or of an answer.

    judged: what the rows before it said; this one's word is added.
    """
    if isinstance(record, Ranking):
        order = dict(zip(record.responses, record.ranks))
        key = (record.messages, tuple(sorted(order)))
        ranks = [order[text] for text in sorted(order)]
        return contradict(judged.setdefault(key, ranks), ranks)
    if isinstance(record, Prompt) and record.answer is not None:
        return judged.setdefault(record.messages, record.answer) != record.answer
    return False


def stream_dialogues(
    paths: Sequence[str | Path], skip_bad: bool, report: Report
) -> Iterator[Dialogue]:
    """Yield what `read_dialogues` returns, row by row; the report is whole at the end."""
    return stream_files(paths, to_dialogue, skip_bad, report)


def read_dialogues(
    paths: Sequence[str | Path], skip_bad: bool = False
) -> tuple[list[Dialogue], Report]:
    """Read demonstrations for supervised fine-tuning: any format with one response per prompt."""
    return read_files(paths, to_dialogue, skip_bad)


def read_rankings(
    paths: Sequence[str | Path], skip_bad: bool = False
) -> tuple[list[Ranking], Report]:
    """Read comparisons for the reward model: pairs and ranked lists."""
    return read_files(paths, to_ranking, skip_bad)


def read_prompts(
    paths: Sequence[str | Path], skip_bad: bool = False
) -> tuple[list[Prompt], Report]:
    """Read prompts for PPO: the prompt part of any format."""
    return read_files(paths, to_prompt, skip_bad)
