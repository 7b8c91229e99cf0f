"""Rows to examples: one parser per format."""
from __future__ import annotations

import re
from typing import Callable, Iterator, NamedTuple, Sequence

from formats.records import BadRow, Message, Messages, Uninformative
from formats.rows import Row, get, get_list, get_numbers, get_optional


class Example(NamedTuple):
    """What every format says: a prompt, responses to it, and how they rank (None: they are not compared)."""
    prompt: Messages
    responses: tuple[str, ...] = ()
    ranks: tuple[float, ...] | None = None
    flaw: str = ""                      # why the responses teach nothing; the prompt is good all the same


DIALOGUES = ("messages", "conversations", "conversation", "items")
# Further tags of real files (bard, tool, developer, observation, ...) are refused: nobody can say what they mean here.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "raw": "raw"}
INPUT = "\n\n### Input:\n"              # joins Alpaca's instruction and input, in its own template's words
HH_ANSWER = "\n\nAssistant:"
TEMPLATE_MARKS = ("### Response:", "[INST]", HH_ANSWER, "ASSISTANT:")


def parse_message(turn: Row) -> Message:
    """{from, value} or {role, content}; the text may come in parts: [{type: "text", text | value}, ...]."""
    role_name, name = ("from", "value") if "from" in turn else ("role", "content")
    role = get(turn, role_name)
    if role not in ROLES:
        raise BadRow("unknown role", f"{role!r}; known: {', '.join(ROLES)}")
    if not isinstance(turn.get(name), list):
        return Message(ROLES[role], get(turn, name))
    parts = get_list(turn, name, dict)
    if any(part.get("type") != "text" for part in parts):
        raise BadRow("a message may have parts of type text only")
    return Message(ROLES[role], "".join(get(part, "value" if "value" in part else "text") for part in parts))


def parse_messages(row: Row, name: str) -> list[Message]:
    return [parse_message(turn) for turn in get_list(row, name, dict)]


def make_example(prompt: Sequence[Message], responses: Sequence[str] = (), ranks: Sequence[float] | None = None,
                 flaw: str = "") -> Example:
    """Check a prompt's roles and texts. Nothing is mended: which turn of a broken dialogue is wrong, nobody knows."""
    prompt = tuple(message for message in prompt if message.role != "system" or message.content.strip())
    if not re.fullmatch("s?u(au)*|r", "".join(message.role[0] for message in prompt)):
        roles = ", ".join(message.role for message in prompt) or "none"
        raise BadRow("roles must be: system if any, then user and assistant in turn", f"got {roles}")
    if not all(message.content.strip() for message in prompt):
        raise BadRow("empty message in the prompt")
    return Example(prompt, tuple(responses), None if ranks is None else tuple(ranks), flaw)


def split_answer(turns: Sequence[Message], flaw: str = "") -> Example:
    """Take a last assistant turn as the response to all before it; a dialogue that ends with the user is a prompt."""
    if turns and turns[-1].role == "assistant":
        return make_example(turns[:-1], [turns[-1].content], flaw=flaw)
    return make_example(turns, flaw=flaw)


def text_prompt(text: str) -> Message:
    """Return a prompt string as what it is: a user's words, or a prompt that somebody put into a template already.

    Trailing spaces of the latter go: with them, the border to the response would lie inside its first word.
    """
    is_raw = any(mark in text for mark in TEMPLATE_MARKS)
    return Message("raw", text.rstrip(" ")) if is_raw else Message("user", text)


def alpaca_prompt(row: Row) -> list[Message]:
    """{instruction, input?, system?, history?: [[user, assistant], ...]}."""
    instruction, extra = get(row, "instruction"), get_optional(row, "input")
    if not instruction.strip():
        raise BadRow("field 'instruction' is empty")
    turns = [Message("system", get_optional(row, "system"))]
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRow("field 'history' must be a list of [user, assistant] strings")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return [*turns, Message("user", instruction + INPUT + extra if extra else instruction)]


def any_prompt(row: Row) -> list[Message]:
    """Return the prompt that goes with one response or with several, in whichever field it is; [] if there is none."""
    if "prompt" in row:
        return parse_messages(row, "prompt") if isinstance(row["prompt"], list) else [text_prompt(get(row, "prompt"))]
    if "instruction" in row:
        return alpaca_prompt(row)
    if "question" in row:
        return [Message("user", get(row, "question"))]
    system = Message("system", get_optional(row, "system"))
    return next(([system, *parse_messages(row, name)] for name in DIALOGUES if name in row), [])


def read_reply(prompt: list[Message], row: Row, name: str) -> tuple[list[Message], str]:
    """Return prompt and response of a field that holds a string, a message, messages that continue the prompt,
    or the whole dialogue, prompt included (as messages, or as HH-RLHF's text)."""
    value = row.get(name)
    if isinstance(value, (list, dict)):
        turns = parse_messages({name: value if isinstance(value, list) else [value]}, name)
        if not turns or turns[-1].role != "assistant":
            raise BadRow(f"field '{name}' must end with a message of the assistant")
        turns = prompt + turns if turns[0].role == "assistant" else turns
        return turns[:-1], turns[-1].content
    if prompt:
        return prompt, get(row, name)
    # HH-RLHF. Its turns stay text: replies quote "\n\nHuman:", so splitting there would invent turns.
    before, mark, reply = get(row, name).rpartition(HH_ANSWER)
    if not mark:
        raise BadRow(f"no prompt: neither a field 'prompt' nor {HH_ANSWER!r} in '{name}'")
    return [Message("raw", before + mark)], reply.removeprefix(" ")


def parse_alpaca(row: Row) -> Iterator[Example]:
    """{instruction, ..., output?}; Alpaca-farm's output is a list of samples that nobody ranked."""
    is_list = isinstance(row.get("output"), list)
    responses = get_list(row, "output", str) if is_list else [get(row, "output")] if "output" in row else []
    yield make_example(alpaca_prompt(row), responses)


def parse_instances(row: Row) -> Iterator[Example]:
    """Self-instruct: {instruction, instances: [{input, output}, ...]}."""
    for instance in get_list(row, "instances", dict):
        yield from parse_alpaca({**instance, "instruction": get(row, "instruction")})


def parse_dialogue(row: Row) -> Iterator[Example]:
    """ShareGPT, OpenAI: {messages | conversations | conversation | items: [...], system?}; KTO: label?."""
    flaw = "marked as undesirable (label: false)" if row.get("label") is False else ""
    yield split_answer(any_prompt({name: row[name] for name in row if name in (*DIALOGUES, "system")}), flaw)


def parse_prompt_response(row: Row) -> Iterator[Example]:
    """{prompt, response? | completion?}, {question, answer?}; strings or message lists."""
    prompt = any_prompt(row)
    name = next((name for name in ("response", "completion", "answer") if name in row), None)
    if name is None:
        yield split_answer(prompt)
    else:
        turns, response = read_reply(prompt, row, name)
        yield make_example(turns, [response])


def parse_pair(row: Row) -> Iterator[Example]:
    """HH-RLHF, TRL, UltraFeedback-binarized, LLaMA-Factory: {chosen, rejected} or {chosen_messages, ...}, any prompt?."""
    suffix = "_messages" if "chosen_messages" in row or "rejected_messages" in row else ""
    prompt = [] if suffix else any_prompt(row)
    chosen_prompt, chosen = read_reply(prompt, row, "chosen" + suffix)
    rejected_prompt, rejected = read_reply(prompt, row, "rejected" + suffix)
    if chosen_prompt != rejected_prompt:
        raise Uninformative("prompts of chosen and rejected differ")
    yield make_example(chosen_prompt, [chosen, rejected], [1, 2])


def get_preference(row: Row) -> float | None:
    """Return AlpacaEval's judgment: the output that wins, 1 or 2, or between them the judge's belief in output 2.

    1.5 is a tie (0 in older files); None is not annotated.
    """
    preference = row.get("preference")
    if preference is not None and (type(preference) not in (int, float) or preference != 0 and not 1 <= preference <= 2):
        raise BadRow("field 'preference' must be null, 0 or a number from 1 to 2", f"got {preference!r}")
    return preference if preference is None else preference or 1.5


def parse_alpaca_eval(row: Row) -> Iterator[Example]:
    """{instruction, output_1, output_2, preference}: see get_preference."""
    preference = get_preference(row)
    flaw = "not annotated (preference: null)" if preference is None else ""
    preference = preference or 1.5
    ranks = [1, 1] if preference == 1.5 else [1, 2] if preference < 1.5 else [2, 1]
    yield make_example(alpaca_prompt(row), [get(row, "output_1"), get(row, "output_2")], ranks, flaw)


def ranks_of(scores: Sequence[float]) -> list[float]:
    """Return ranks as in a competition: 1 for the highest score, equal ranks for equal scores."""
    return [1 + sum(other > score for other in scores) for score in scores]


def parse_ranked(row: Row) -> Iterator[Example]:
    """{any prompt, responses: [...], scores (higher is better) and/or ranks (lower is better)}."""
    responses = get_list(row, "responses", str)
    orders = [ranks_of(get_numbers(row, "scores"))] if row.get("scores") is not None else []
    orders += [get_numbers(row, "ranks")] if row.get("ranks") is not None else []
    if not responses or not orders:
        raise BadRow("'responses' and their 'ranks' or 'scores' are needed", f"keys: {', '.join(row)}")
    if any(len(order) != len(responses) for order in orders):
        raise BadRow("not as many ranks or scores as responses")
    a, b = orders[0], orders[-1]
    if any((a[i] - a[j]) * (b[i] - b[j]) < 0 for i in range(len(a)) for j in range(i)):
        raise BadRow("ranks and scores contradict each other")
    yield make_example(any_prompt(row), responses, b)


def parse_ultrafeedback(row: Row) -> Iterator[Example]:
    """{instruction, completions: [{response, fine-grained_score, overall_score}, ...]}.

    The fine-grained score, a mean over four aspects, goes first: overall scores of 1 were published as 10.
    """
    completions = get_list(row, "completions", dict)
    name = "fine-grained_score" if all(c.get("fine-grained_score") is not None for c in completions) else "overall_score"
    flaw = "not annotated (a completion without score)" if any(c.get(name) is None for c in completions) else ""
    scores = get_numbers({name: [c.get(name) or 0 for c in completions]}, name)
    yield make_example(alpaca_prompt(row), [get(c, "response") for c in completions], ranks_of(scores), flaw)


# A row belongs to the first group that knows one of its fields. Two formats of one group are ambiguous.
FORMATS: tuple[dict[str, Callable[[Row], Iterator[Example]]], ...] = (
    {"chosen": parse_pair, "rejected": parse_pair, "chosen_messages": parse_pair, "rejected_messages": parse_pair,
     "output_1": parse_alpaca_eval, "output_2": parse_alpaca_eval,
     "responses": parse_ranked, "completions": parse_ultrafeedback},
    {"instances": parse_instances, **dict.fromkeys(DIALOGUES, parse_dialogue)},
    {"instruction": parse_alpaca, "prompt": parse_prompt_response, "question": parse_prompt_response},
)


def parse_example(row: Row) -> Iterator[Example]:
    """Recognise a row's format by its fields and parse it."""
    for group in FORMATS:
        known = [name for name in group if name in row]
        if len({group[name] for name in known}) > 1:
            raise BadRow("ambiguous fields", f"keep one of {', '.join(known)}; keys: {', '.join(row)}")
        if known:
            return group[known[0]](row)
    raise BadRow("unknown fields", f"keys: {', '.join(row) or 'none'}")
