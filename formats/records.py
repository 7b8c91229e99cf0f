"""Records: what every format becomes, and what is said of rows that do not become one."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Sequence


@dataclass(frozen=True)
class Message:
    """One turn. Role "raw": a whole prompt that already is in some template and stays as it is."""
    role: str                           # system | user | assistant | raw
    content: str


Messages = tuple[Message, ...]          # system?, user, assistant, user, ...; or raw, assistant?


def dialogue_text(messages: Sequence[Message]) -> str:
    """Return messages as people read them: the one text, or every text with its role in front."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


@dataclass(frozen=True)
class Dialogue:
    """A demonstration; the last message is the assistant's.

    source: "file:line", or "file:row N" of a JSON array.
    """
    messages: Messages
    source: str


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt and their ranks: lower is better, equal is a tie."""
    messages: Messages
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: one record from the file to the evaluation.

    answer: the reference answer where there is one, to be shown and judged by, never learned.
    task: "" for the domain itself, else the name of a general task.
    ids: the tokens that the model reads; () until `data.encode_prompts` fills them in.
    """
    messages: Messages
    source: str
    answer: str | None = None
    task: str = ""
    ids: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The whole dialogue as people read it."""
        return dialogue_text(self.messages)


Record = Dialogue | Ranking | Prompt


@dataclass
class Report:
    """What became of the rows; str(report) is the line to print."""
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)      # reason -> rows
    noted: Counter[str] = field(default_factory=Counter)        # kept, but worth a look -> rows
    first: dict[str, str] = field(default_factory=dict)         # reason -> source of its first row
    tokens: int = 0                                             # of all that was kept and encoded
    longest: int = 0                                            # of these [tokens]

    def keep(self, tokens: int = 0) -> None:
        self.kept += 1
        self.tokens += tokens
        self.longest = max(self.longest, tokens)

    def skip(self, reason: str, source: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, source)

    def note(self, reason: str, source: str) -> None:
        self.noted[reason] += 1
        self.first.setdefault(reason, source)

    def describe(self, reasons: Counter[str]) -> str:
        return ", ".join(
            f"{n} {reason} (first {self.first[reason]})" for reason, n in reasons.most_common()
        )

    def __str__(self) -> str:
        parts = [f"kept {self.kept} of {self.kept + self.skipped.total()}"]
        if self.skipped:
            parts.append(f"skipped {self.describe(self.skipped)}")
        if self.noted:
            parts.append(f"noted {self.describe(self.noted)}")
        if self.tokens:
            parts.append(f"tokens: mean {self.tokens / self.kept:.0f}, longest {self.longest}")
        return "; ".join(parts)

    def add(self, other: Report) -> None:
        """Count a later file's rows too; where both know a reason, the first source stays."""
        self.kept += other.kept
        self.skipped += other.skipped
        self.noted += other.noted
        self.first = {**other.first, **self.first}

    def require_rows(self, where: str, advice: str) -> None:
        """Raise ValueError if nothing was kept."""
        if not self.kept:
            reasons = self.describe(self.skipped) or "it is empty"
            rows = self.skipped.total()
            raise ValueError(f"{where}: 0 usable rows of {rows} ({reasons}); {advice}")


class BadRow(Exception):
    """A malformed row. reason: the kind of fault, which reports count; detail: this one's own."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class Uninformative(Exception):
    """A well-formed row with nothing to learn from."""


def prompt_key(record: Prompt | Dialogue | Ranking) -> str:
    """Return what makes two prompts the same: their text, however it is spaced."""
    messages = record.messages[:-1] if isinstance(record, Dialogue) else record.messages
    return " ".join(dialogue_text(messages).split())


def without_repeats(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Keep the first of equal prompts: an interval counts each as news, and the second is none."""
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt_key(prompt), prompt)
    return list(distinct.values())
