"""Rows to examples: one parser per format, each with the row it reads in its docstring.

In the docstrings "name?" is a field that may be missing, and "a | b" is one or the other.
A new format is a parser and its line in FORMATS, both at the end of this file.
"""
from __future__ import annotations

import re
from typing import Callable, Iterator, NamedTuple, Sequence

from formats.records import BadRow, Message, Messages, Uninformative
from formats.rows import Row, get, get_list, get_numbers, get_optional


class Example(NamedTuple):
    """What every format says: a prompt, responses to it, and how they rank."""
    prompt: Messages
    responses: tuple[str, ...] = ()
    ranks: tuple[float, ...] | None = None      # lower is better; None: they are not compared
    flaw: str = ""                              # why the responses teach nothing


# Further tags of real files (bard, tool, developer, observation, ...) are refused: nobody can say
# what they mean here.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "raw": "raw",
}
DIALOGUES = ("messages", "conversations", "conversation", "items")  # fields that hold one
REPLIES = ("response", "completion", "answer")                      # fields that hold one response
SYSTEMS = ("system", "system_prompt")                               # fields with a system text
LABELS = ("label", "kto_tag")                                       # fields with KTO's mark
PASSAGES = ("context", "passage")       # fields with the text that the question is about
INPUT = "\n\n### Input:\n"              # joins Alpaca's instruction and input, as in its template
HH_ANSWER = "\n\nAssistant:"
TEMPLATE_MARKS = ("### Response:", "[INST]", HH_ANSWER, "ASSISTANT:", "<|im_start|>",
                  "<|start_header_id|>", "<|user|>", "<start_of_turn>")

# Templates whose borders are control tokens, one expression for a turn: role and content. The last
# turn may be the assistant's without a word, which is where the answer begins.
MARKED_UP = tuple(re.compile(turn, re.DOTALL) for turn in (
    r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)",
    r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)"
    r"(?:<\|eot_id\|>|\Z)",
    r"<\|(system|user|assistant)\|>\n(.*?)(?:</s>\n?|\Z)",
    r"(?:<bos>)?<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>\n?|\Z)",
))
ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
        "<eos>")
END_AS_TEXT = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, ENDS))}))+\s*\Z")


# ------------------------------------------------------------------------------------------
# Parts of a row

def parse_message(turn: Row) -> Message:
    """{from, value} | {role, content}; a text may come in parts: [{type: "text", text | value}]."""
    role_name, name = ("from", "value") if "from" in turn else ("role", "content")
    role = get(turn, role_name)
    if role not in ROLES:
        raise BadRow("unknown role", f"{role!r}; known: {', '.join(ROLES)}")
    if not isinstance(turn.get(name), list):
        return Message(ROLES[role], get(turn, name))

    text = ""
    for part in get_list(turn, name, dict):
        if part.get("type") != "text":
            raise BadRow("a message may have parts of type text only")
        text += get(part, "value" if "value" in part else "text")
    return Message(ROLES[role], text)


def parse_messages(row: Row, name: str) -> list[Message]:
    return [parse_message(turn) for turn in get_list(row, name, dict)]


def make_example(
    prompt: Sequence[Message],
    responses: Sequence[str] = (),
    ranks: Sequence[float] | None = None,
    flaw: str = "",
) -> Example:
    """Check a prompt's roles and texts; an empty system text is none."""
    # Nothing is mended: which turn of a broken dialogue is wrong, nobody knows. A guess would teach
    # the model to answer itself, or to speak for the user.
    prompt = tuple(message for message in prompt if is_said(message))
    initials = "".join(message.role[0] for message in prompt)  # of "suau": system, user, ...
    if not re.fullmatch("s?u(au)*|r", initials):
        roles = ", ".join(message.role for message in prompt) or "none"
        raise BadRow(roles_fault(initials), "roles must be: system if any, then user and "
                     f"assistant in turn; got {roles}")
    if not all(message.content.strip() for message in prompt):
        raise BadRow("empty message in the prompt")
    return Example(prompt, tuple(responses), None if ranks is None else tuple(ranks), flaw)


def roles_fault(initials: str) -> str:
    """Say what is wrong with the roles of a dialogue, in the words that reports count."""
    if not initials:
        return "no messages"
    if initials.startswith(("a", "sa")):
        return "begins with the assistant"
    doubled = re.search("uu|aa", initials)
    if doubled:
        return f"two turns in a row by the {'user' if doubled[0] == 'uu' else 'assistant'}"
    return "roles out of order"


def is_said(message: Message) -> bool:
    return message.role != "system" or bool(message.content.strip())


def split_answer(turns: Sequence[Message], flaw: str = "") -> Example:
    """Take a last assistant turn as the response to all before it.

    A dialogue that ends with the user is a prompt without response.
    """
    if turns and turns[-1].role == "assistant":
        return make_example(turns[:-1], [turns[-1].content], flaw=flaw)
    return make_example(turns, flaw=flaw)


def text_prompt(text: str) -> Message:
    """Return a prompt string as what it is: a user's words, or a prompt already in a template."""
    # Put into a template once more, the latter would ask about a dialogue instead of going on with
    # it. Its trailing spaces go: with them, the border would lie inside the response's first word.
    is_raw = any(mark in text for mark in TEMPLATE_MARKS)
    return Message("raw", text.rstrip(" ")) if is_raw else Message("user", text)


def marked_up(text: str) -> list[Message]:
    """Return the dialogue of a prompt that is written in ChatML or its kin; [] if it is not.

    Its control tokens are text here, and would stay text: no model reads them so.
    """
    for turn in MARKED_UP:
        found = list(turn.finditer(text))
        rest = turn.sub("", text)
        if found and not rest.strip() and all(one[1] in ROLES for one in found):
            messages = [Message(ROLES[one[1]], one[2]) for one in found]
            if messages[-1].role == "assistant" and not messages[-1].content.strip():
                messages.pop()
            return messages
    return []


def system_of(row: Row) -> list[Message]:
    """{system? | system_prompt?}."""
    return [Message("system", get_optional(row, name)) for name in SYSTEMS if name in row]


def passage_of(row: Row) -> str:
    """{context? | passage?}."""
    return "\n\n".join(text for text in (get_optional(row, name) for name in PASSAGES) if text)


def with_passage(row: Row, message: Message) -> Message:
    """Put the passage that a question is about in front of it."""
    passage = passage_of(row)
    if not passage:
        return message
    return Message(message.role, f"{passage}\n\n{message.content}")


def alpaca_prompt(row: Row) -> list[Message]:
    """{instruction, input? | context?, system?, history?: [[user, assistant], ...]}."""
    instruction = get(row, "instruction")
    extra = "\n\n".join(text for text in (get_optional(row, "input"), passage_of(row)) if text)
    if not instruction.strip():
        raise BadRow("field 'instruction' is empty")

    turns = system_of(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise BadRow("field 'history' must be a list of [user, assistant] strings")
        question, answer = pair
        turns += [Message("user", question), Message("assistant", answer)]
    return [*turns, Message("user", instruction + INPUT + extra if extra else instruction)]


def any_prompt(row: Row) -> list[Message]:
    """{prompt: text | messages} | {instruction, ...} | {question} | {messages | ...}.

    Each with system? | system_prompt? and context? | passage? beside it. Returns [] if there is
    none of them: HH-RLHF has the prompt inside its responses.
    """
    if "instruction" in row and "prompt" not in row:
        return alpaca_prompt(row)
    name = only_one(row, ("prompt", "question")) or only_one(row, DIALOGUES)
    if not name:
        return []
    is_list = name in DIALOGUES or name == "prompt" and isinstance(row[name], list)
    turns = parse_messages(row, name) if is_list else prompt_turns(get(row, name), name)
    if turns and turns[-1].role == "user":
        turns[-1] = with_passage(row, turns[-1])
    return [*system_of(row), *turns]


def only_one(row: Row, names: Sequence[str]) -> str:
    """Return which of the names for one thing a row has, "" if none; BadRow if two say different.

    Which of them is meant nobody knows, and whoever made the file thought that both are read.
    """
    found = [name for name in names if name in row]
    first, *others = [name for name in found if row[name] is not None] or found or [""]
    for other in others:
        said = [parse_messages(row, name) if name in DIALOGUES else row[name]
                for name in (first, other)]
        if said[0] != said[1]:
            raise BadRow(f"fields '{first}' and '{other}' say different things", "keep one")
    return first


def prompt_turns(text: str, name: str) -> list[Message]:
    """Return the turns of a prompt that is one text."""
    if name == "question":
        return [Message("user", text)]
    return marked_up(text) or [text_prompt(text)]


def read_reply(prompt: list[Message], row: Row, name: str) -> tuple[list[Message], str]:
    """Return prompt and response of a field in any of the ways that people write it.

    "A" | {role, content} | [messages that continue the prompt] | [the whole dialogue], or, where
    the row has no prompt, HH-RLHF's "\\n\\nHuman: Q\\n\\nAssistant: A".
    """
    value = row.get(name)
    if isinstance(value, (list, dict)):
        turns = parse_messages({name: value if isinstance(value, list) else [value]}, name)
        if not turns or turns[-1].role != "assistant":
            raise BadRow(f"field '{name}' must end with a message of the assistant")
        continues_prompt = turns[0].role == "assistant"
        *before, answer = prompt + turns if continues_prompt else turns
        return before, answer.content

    text = get(row, name)
    if prompt:
        return prompt, text

    # HH-RLHF. Its turns stay text: replies quote "\n\nHuman:", so splitting there would invent
    # turns. Only the last "Assistant:" is known to be a border.
    question, mark, answer = text.rpartition(HH_ANSWER)
    if not mark:
        raise BadRow(f"no prompt: neither a field 'prompt' nor {HH_ANSWER!r} in '{name}'")
    return [Message("raw", question + mark)], answer.removeprefix(" ")


def ranks_of(scores: Sequence[float]) -> list[float]:
    """Return ranks as in a competition: 1 for the highest score, equal ranks for equal scores."""
    return [1 + sum(other > score for other in scores) for score in scores]


def contradict(ranks: Sequence[float], others: Sequence[float]) -> bool:
    """Tell whether two orders disagree on a pair; a tie in one of them agrees with anything."""
    for i in range(len(ranks)):
        for j in range(i):
            if (ranks[i] - ranks[j]) * (others[i] - others[j]) < 0:
                return True
    return False


def get_preference(row: Row) -> float | None:
    """{preference?: null | number}: AlpacaEval's judgment between output 1 and output 2.

    Returns: 1 or 2, the output that wins, or between them the judge's belief in output 2. 1.5 is
    a tie (written 0 in older files); None is not annotated.
    """
    preference = row.get("preference")
    if preference is None:
        return None
    is_number = type(preference) in (int, float)
    if not is_number or (preference != 0 and not 1 <= preference <= 2):
        rule = "field 'preference' must be null, 0 or a number from 1 to 2"
        raise BadRow(rule, f"got {preference!r}")
    return preference or 1.5


# ------------------------------------------------------------------------------------------
# Comparisons

def parse_pair(row: Row) -> Iterator[Example]:
    """{chosen, rejected, any prompt?} | {chosen_messages, rejected_messages}.

    HH-RLHF, TRL, UltraFeedback-binarized, LLaMA-Factory. Replies: see `read_reply`.
    """
    suffix = "_messages" if "chosen_messages" in row or "rejected_messages" in row else ""
    prompt = [] if suffix else any_prompt(row)
    chosen_prompt, chosen = read_reply(prompt, row, "chosen" + suffix)
    rejected_prompt, rejected = read_reply(prompt, row, "rejected" + suffix)
    if chosen_prompt != rejected_prompt:
        raise Uninformative("prompts of chosen and rejected differ")
    yield make_example(chosen_prompt, [chosen, rejected], [1, 2])


def parse_alpaca_eval(row: Row) -> Iterator[Example]:
    """{instruction, output_1, output_2, preference}: see `get_preference`."""
    # A row without judgement still has a good prompt, so it is no bad row: the flaw keeps it from
    # the reward model alone.
    preference = get_preference(row)
    flaw = "not annotated (preference: null)" if preference is None else ""
    if preference is None or preference == 1.5:
        ranks = [1, 1]
    elif preference < 1.5:
        ranks = [1, 2]
    else:
        ranks = [2, 1]
    responses = [get(row, "output_1"), get(row, "output_2")]
    yield make_example(alpaca_prompt(row), responses, ranks, flaw)


def parse_ranked(row: Row) -> Iterator[Example]:
    """{any prompt, responses: [...], scores?: higher is better, ranks?: lower is better}."""
    responses = get_list(row, "responses", str)
    orders = []
    if row.get("scores") is not None:
        orders.append(ranks_of(get_numbers(row, "scores")))
    if row.get("ranks") is not None:
        orders.append(get_numbers(row, "ranks"))

    # With both there is one order to learn, the ranks; the scores must not say the opposite.
    if not responses or not orders:
        rule = "'responses' and their 'ranks' or 'scores' are needed"
        raise BadRow(rule, f"keys: {', '.join(row)}")
    if any(len(order) != len(responses) for order in orders):
        raise BadRow("not as many ranks or scores as responses")
    if contradict(orders[0], orders[-1]):
        raise BadRow("ranks and scores contradict each other")
    yield make_example(any_prompt(row), responses, orders[-1])


def parse_ultrafeedback(row: Row) -> Iterator[Example]:
    """{instruction, completions: [{response, fine-grained_score?, overall_score?}, ...]}."""
    # The fine-grained score, a mean over four aspects, goes first: overall scores of 1 were
    # published as 10.
    completions = get_list(row, "completions", dict)
    responses = [get(completion, "response") for completion in completions]
    name = "fine-grained_score"
    if any(completion.get(name) is None for completion in completions):
        name = "overall_score"

    values = [completion.get(name) for completion in completions]
    flaw = "not annotated (a completion without score)" if None in values else ""
    scores = get_numbers({name: [value or 0 for value in values]}, name)
    yield make_example(alpaca_prompt(row), responses, ranks_of(scores), flaw)


# ------------------------------------------------------------------------------------------
# Demonstrations and prompts

def parse_alpaca(row: Row) -> Iterator[Example]:
    """{instruction, input?, system?, history?, output?: text | [text, ...], label?}."""
    # Alpaca-farm's output is a list of samples that nobody ranked: its prompts serve PPO.
    if isinstance(row.get("output"), list):
        responses = get_list(row, "output", str)
    else:
        responses = [get(row, "output")] if "output" in row else []
    yield make_example(alpaca_prompt(row), responses, flaw=flaw_of(row))


def parse_instances(row: Row) -> Iterator[Example]:
    """{instruction, instances: [{input, output}, ...]}: self-instruct."""
    for instance in get_list(row, "instances", dict):
        yield from parse_alpaca({**instance, "instruction": get(row, "instruction")})


def parse_dialogue(row: Row) -> Iterator[Example]:
    """{messages | conversations | conversation | items: [...], system?, label?}."""
    # ShareGPT's and OpenAI's. Only these fields: a prompt beside the messages, which some sets
    # have, repeats their start.
    dialogue = {name: row[name] for name in row if name in (*DIALOGUES, *SYSTEMS)}
    yield split_answer(any_prompt(dialogue), flaw_of(row))


def parse_prompt_response(row: Row) -> Iterator[Example]:
    """{prompt: text | messages, response? | completion? | answer?, label?} | {question, ...}."""
    prompt = any_prompt(row)
    reply = only_one(row, REPLIES)
    if reply:
        turns, response = read_reply(prompt, row, reply)
        yield make_example(turns, [response], flaw=flaw_of(row))
    else:
        yield split_answer(prompt)


def flaw_of(row: Row) -> str:
    """{label? | kto_tag?: boolean}: KTO's. False marks an answer that nobody should imitate."""
    # as CSV and pandas write it, too
    is_bad = any(str(row.get(name)).lower() in ("false", "0", "0.0") for name in LABELS)
    return "marked as undesirable (label: false)" if is_bad else ""


# ------------------------------------------------------------------------------------------
# The formats: which field tells which

# A row belongs to the first group that knows one of its fields, as a comparison names its prompt
# in the fields of a demonstration. Two formats of one group are ambiguous.
FORMATS: tuple[dict[str, Callable[[Row], Iterator[Example]]], ...] = (
    {
        "chosen": parse_pair,
        "rejected": parse_pair,
        "chosen_messages": parse_pair,
        "rejected_messages": parse_pair,
        "output_1": parse_alpaca_eval,
        "output_2": parse_alpaca_eval,
        "responses": parse_ranked,
        "completions": parse_ultrafeedback,
    },
    {
        "instances": parse_instances,
        **dict.fromkeys(DIALOGUES, parse_dialogue),
    },
    {
        "instruction": parse_alpaca,
        "prompt": parse_prompt_response,
        "question": parse_prompt_response,
    },
)


def parse_example(row: Row) -> Iterator[Example]:
    """Recognise a row's format by its fields and parse it."""
    for group in FORMATS:
        known = [name for name in group if name in row]
        if len({group[name] for name in known}) > 1:
            keys = f"keep one of {', '.join(known)}; keys: {', '.join(row)}"
            raise BadRow("ambiguous fields", keys)
        if known:
            return group[known[0]](row)
    raise BadRow("unknown fields", f"keys: {', '.join(row) or 'none'}")


def prompt_field(messages: Messages) -> str | list[dict[str, str]]:
    """Return what a field "prompt" says that `any_prompt` reads as these messages."""
    first, *others = messages
    if not others and [first] == prompt_turns(first.content, "prompt"):
        return first.content
    return [{"role": message.role, "content": message.content} for message in messages]
