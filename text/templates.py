"""Chat templates: how a dialogue becomes text and control tokens.

<s> is BOS and </s> EOS; what is trained on is underlined:

    plain     <s>question\\nanswer</s>\\nquestion\\nanswer</s>
                           ----------            ----------
    llama2    <s>[INST] question [/INST] answer </s><s>[INST] question [/INST] answer </s>
                                        ------------                          ------------
    chatml    <|im_start|>user\\nquestion<|im_end|>\\n<|im_start|>assistant\\nanswer<|im_end|>
                                                                            ----------------

In the parts of a Template, llama2's turn is "[INST] question [/INST]", its `before` and its `after`
are a space each, and it restarts. The answer's ids include `before`, `after` and its end.

A new template is its turn function and its line in TEMPLATES.
"""
from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

from formats import Message, Messages
from formats.parsers import INPUT
from text.tokenizer import Tokenizer


class Control(str):
    """A control token, by its name: an id of its own, which no text ever becomes."""


EOS = Control("EOS")  # whichever the tokenizer has


class Template(NamedTuple):
    """How a dialogue becomes text.

    turn(system, user, is_first): all that stands between the end of one answer and the start of
        the next: texts and control tokens.
    """
    turn: Callable[[str, str, bool], Sequence[str]]
    before: str = ""                    # between that and the answer, encoded with the answer
    after: str = ""                     # between the answer and its end
    end: str = ""                       # the control token that ends an answer; "": EOS
    opens: bool = True                  # a sequence begins as the tokenizer has it, with BOS mostly
    restarts: bool = False              # every turn is a sequence of its own
    trims: bool = False                 # texts lose the spaces at their borders

    def turn_parts(self, system: str, user: str, is_first: bool) -> list[str]:
        """Return the parts of a turn, no two texts side by side."""
        if self.trims:
            system, user = system.strip(), user.strip()
        return join_texts(self.turn(system, user, is_first))


def alpaca_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Stanford Alpaca's wording, with a newline after "Response:"."""
    # The newline is a border that no token crosses. The original has one turn and no system text:
    # here a system text replaces its preamble, and further turns repeat the rest.
    context = ", paired with an input that provides further context" if INPUT in user else ""
    preamble = system or (f"Below is an instruction that describes a task{context}. "
                          "Write a response that appropriately completes the request.")
    return [f"{preamble if is_first else ''}\n\n### Instruction:\n{user}\n\n### Response:\n"]


def llama2_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Llama-2 chat, as in Meta's generation.py."""
    # Meta strips the two texts together: spaces before the user's words stay after a system text.
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return [f"[INST] {(system + user).strip()} [/INST]"]


def vicuna_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Vicuna v1.1, as in FastChat's conversation.py."""
    preamble = system or (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    return [f"{preamble + ' ' if is_first else ''}USER: {user} ASSISTANT:"]


def plain_turn(system: str, user: str, is_first: bool) -> list[str]:
    """The texts alone, each on lines of its own."""
    # For models from scratch, the embedded world's: they know no wording that would tell them what
    # a turn is, so a newline serves as well and costs one token.
    start = "" if is_first else "\n"
    return [start + (system + "\n" if system else "") + user + "\n"]


def chatml_turn(system: str, user: str, is_first: bool) -> list[str]:
    """OpenAI's ChatML, as Qwen, SmolLM2 and many fine-tunes have it."""
    start, end = Control("<|im_start|>"), Control("<|im_end|>")
    told = [start, f"system\n{system}", end, "\n"] if system else []
    before = [] if is_first else ["\n"]
    return [*before, *told, start, f"user\n{user}", end, "\n", start, "assistant\n"]


def llama3_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Llama 3, as in Meta's chat_format.py."""
    def header(role: str) -> list[str]:
        return [Control("<|start_header_id|>"), role, Control("<|end_header_id|>")]

    end = Control("<|eot_id|>")
    told = [*header("system"), f"\n\n{system}", end] if system else []
    return [*told, *header("user"), f"\n\n{user}", end, *header("assistant"), "\n\n"]


def zephyr_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Zephyr's, as TinyLlama-Chat 1.0 has it too: roles are text, only EOS is a control token."""
    told = [f"<|system|>\n{system}", EOS, "\n"] if system else []
    before = [] if is_first else ["\n"]
    return [*before, *told, f"<|user|>\n{user}", EOS, "\n<|assistant|>\n"]


def mistral_turn(system: str, user: str, is_first: bool) -> list[str]:
    """Mistral's since version 0.3, where [INST] is a control token; before, it was text."""
    told = f"{system}\n\n" if system else ""
    return [Control("[INST]"), f" {told}{user}", Control("[/INST]")]


def trimmed(text: str) -> str:
    """Return an answer without spaces at its borders; an indentation is no border."""
    return text.rstrip() if text.startswith(("  ", "\t")) else text.strip()


def join_texts(parts: Sequence[str]) -> list[str]:
    """Join neighbouring texts: a tokenizer sees all between two control tokens as one."""
    joined: list[str] = []
    for part in parts:
        is_text = not isinstance(part, Control)
        if is_text and joined and not isinstance(joined[-1], Control):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined


# The keys are the values of --data.template; each has its file in chat/.
#
# Meta's code ends every finished turn with a space before EOS. So that space ends every llama2
# answer here, the last and the ranked ones included: one habit for the policy to learn, whether or
# not another turn follows.
TEMPLATES = {
    "alpaca": Template(alpaca_turn),
    "llama2": Template(llama2_turn, before=" ", after=" ", restarts=True),
    "vicuna": Template(vicuna_turn, before=" "),
    "plain": Template(plain_turn),
    "chatml": Template(chatml_turn, end="<|im_end|>", opens=False),
    "llama3": Template(llama3_turn, end="<|eot_id|>", trims=True),
    "zephyr": Template(zephyr_turn, opens=False),
    "mistral": Template(mistral_turn, before=" "),
}
AUTO = "auto"  # the checkpoint's own


def template_for(name: str, messages: Sequence[Message]) -> Template:
    """Return the named template, or for a raw prompt one that leaves it as it is."""
    # The name is checked for a raw prompt as well: a misspelt one should not wait for another row.
    if name not in TEMPLATES:
        raise ValueError(f"unknown template '{name}'; choose one of {', '.join(TEMPLATES)}")
    if not messages or messages[0].role != "raw":
        return TEMPLATES[name]

    # "... Assistant:" is followed by a space and the answer, a line "### Response:" by the answer.
    ends_a_line = messages[0].content.endswith("\n")
    return Template(lambda system, user, is_first: [user], before="" if ends_a_line else " ",
                    end=TEMPLATES[name].end)


def split_system(messages: Sequence[Message]) -> tuple[Messages, Messages]:
    """Return the system message, if there is one, and all others."""
    n_system = 1 if messages[0].role == "system" else 0
    return tuple(messages[:n_system]), tuple(messages[n_system:])


def choose_template(name: str, tokenizer: Tokenizer) -> str:
    """Return the template to use. name: one of TEMPLATES, or "auto": the checkpoint's own.

    ValueError if a checkpoint's own is none of ours, or the tokenizer lacks its control tokens.
    """
    if name == AUTO:
        name = tokenizer.own.name
        if not name:
            raise ValueError(f"{tokenizer.own.fault}: give --data.template="
                             f"{'|'.join(TEMPLATES)}")
    template = template_for(name, ())
    for part in (*template.turn_parts("a", "b", True), Control(template.end or EOS)):
        if isinstance(part, Control):
            control_id(tokenizer, part)
            continue
        for control in tokenizer.controls:
            if control in part:
                raise ValueError(f"{tokenizer.path}: {control}, which is text in the template "
                                 f"{name}, is a control token of this tokenizer: give another "
                                 f"--data.template={'|'.join(TEMPLATES)}")
    return name


def control_id(tokenizer: Tokenizer, name: str) -> int:
    """Return a control token's id; ValueError if the tokenizer has none of this name."""
    if name == EOS:
        return tokenizer.eos_id
    if name not in tokenizer.controls:
        raise ValueError(f"{tokenizer.path}: has no control token {name}, which the template "
                         f"needs; it has {', '.join(tokenizer.controls)}: give another "
                         f"--data.template={'|'.join(TEMPLATES)}")
    return tokenizer.controls[name]


def end_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Return what ends an answer: first the one that is trained on, then what else may be drawn."""
    end = control_id(tokenizer, template_for(template, ()).end or EOS)
    return tuple(dict.fromkeys((end, *tokenizer.eos_ids)))
