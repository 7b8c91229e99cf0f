"""Records: what every format becomes, and what is said of rows that do not become one."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Message:
    """One turn. A message of role "raw" is a whole prompt that already is in some template and stays as it is."""
    role: str                           # system | user | assistant | raw
    content: str


Messages = tuple[Message, ...]          # system?, user, assistant, user, ...; or raw, assistant?


@dataclass(frozen=True)
class Dialogue:
    """A demonstration; the last message is the assistant's. source: "file:line", or "file:row N" of a JSON array."""
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
    """A prompt to answer. answer: the reference answer where the file has one, to be shown, not learned."""
    messages: Messages
    source: str
    answer: str | None = None


Record = Dialogue | Ranking | Prompt


@dataclass
class Report:
    """What became of the rows; str(report) is the line to print."""
    kept: int = 0
    skipped: Counter[str] = field(default_factory=Counter)      # reason -> rows
    noted: Counter[str] = field(default_factory=Counter)        # kept, but worth a look -> rows
    first: dict[str, str] = field(default_factory=dict)         # reason -> source of its first row
    tokens: int = 0                                             # of all that was kept, once it is encoded
    longest: int = 0

    def keep(self, tokens: int = 0) -> None:
        self.kept, self.tokens, self.longest = self.kept + 1, self.tokens + tokens, max(self.longest, tokens)

    def skip(self, reason: str, source: str) -> None:
        self.skipped[reason] += 1
        self.first.setdefault(reason, source)

    def note(self, reason: str, source: str) -> None:
        self.noted[reason] += 1
        self.first.setdefault(reason, source)

    def describe(self, reasons: Counter[str]) -> str:
        return ", ".join(f"{n} {reason} (first {self.first[reason]})" for reason, n in reasons.most_common())

    def __str__(self) -> str:
        parts = [f"kept {self.kept} of {self.kept + self.skipped.total()}"]
        parts += [f"skipped {self.describe(self.skipped)}"] * bool(self.skipped)
        parts += [f"noted {self.describe(self.noted)}"] * bool(self.noted)
        if self.tokens:
            parts.append(f"tokens: mean {self.tokens / self.kept:.0f}, longest {self.longest}")
        return "; ".join(parts)

    def add(self, other: Report) -> None:
        self.kept += other.kept
        self.skipped += other.skipped
        self.noted += other.noted
        self.first = {**other.first, **self.first}

    def require_rows(self, where: str, advice: str) -> None:
        """Raise ValueError if nothing was kept."""
        if not self.kept:
            reasons = self.describe(self.skipped) or "it is empty"
            raise ValueError(f"{where}: 0 usable rows of {self.skipped.total()} ({reasons}); {advice}")


class BadRow(Exception):
    """A malformed row: the kind of fault, which reports count, and details of this one."""

    def __str__(self) -> str:
        reason, *details = self.args
        return f"{reason} ({', '.join(map(str, details))})" if details else reason


class Uninformative(Exception):
    """A well-formed row with nothing to learn from."""
