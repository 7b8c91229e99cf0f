"""Chat templates of model folders, in Jinja: which of ours a checkpoint's own is, and ours written.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn, Sequence

from formats import Message
from text.folder import chat_template_of
from text.templates import EOS, TEMPLATES, Template
from text.tokenizer import Own, Tokenizer

# What a chat template names -> ours that it may be, for advice.
HINTS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3", "<|user|>": "zephyr",
         "USER:": "vicuna", "### Instruction:": "alpaca", "[INST]": "mistral"}

# The texts that both are tried on. No template here strips or changes them.
SYSTEM = "Be brief, please."
QUESTION = Message("user", "What is that?")
DIALOGUE = (QUESTION, Message("assistant", "A tree."), Message("user", "And this?"))


def recognise(tokenizer: Tokenizer, folder: Path) -> Own:
    """Find the template whose rendering equals that of a folder's chat template."""
    source = chat_template_of(folder)
    if source is None:
        return Own(fault=f"{folder}: brings no chat template")
    near = next((name for mark, name in HINTS.items() if mark in source), "plain")
    try:
        import jinja2.sandbox
    except ImportError:
        return Own(near, exists=True)  # by the control tokens that it names
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True,
                                                               lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    opening = "".join(map(tokenizer.piece, tokenizer.opening))
    eos = tokenizer.piece(tokenizer.eos_id)
    bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)

    def theirs(messages: Sequence[Message]) -> str | None:
        rows = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = environment.from_string(source).render(
                messages=rows, add_generation_prompt=True, eos_token=eos, bos_token=bos)
        except (jinja2.TemplateError, TypeError, ValueError):
            return None  # it refuses system texts, say
        # some write the space that opens a text, as jinja_of does
        return text.replace(opening + " ", opening) if opening else text

    for name, template in TEMPLATES.items():
        told = theirs((Message("system", SYSTEM), QUESTION))
        if told not in (None, rendered(tokenizer, template, SYSTEM, (QUESTION,))):
            continue
        system = default_system(theirs(DIALOGUE), tokenizer, template)
        if system is not None:
            return Own(name, system, exists=True)
    return Own(fault=f"{folder}: its chat template is none of {', '.join(TEMPLATES)}; "
                     f"by the tokens that it names the nearest is --data.template={near}",
               exists=True)


def refuse(reason: str) -> NoReturn:
    """Be the function by which chat templates refuse a dialogue."""
    raise ValueError(reason)


def default_system(theirs: str | None, tokenizer: Tokenizer, template: Template) -> str | None:
    """Return the system text in a rendering of DIALOGUE, which has none; None: it is another's."""
    if theirs == rendered(tokenizer, template, "", DIALOGUE):
        return ""
    before, _, after = rendered(tokenizer, template, SYSTEM, DIALOGUE).partition(SYSTEM)
    if theirs is None or not (theirs.startswith(before) and theirs.endswith(after)):
        return None
    system = theirs[len(before):len(theirs) - len(after)]
    is_same = rendered(tokenizer, template, system, DIALOGUE) == theirs
    return system if system and is_same else None


def rendered(tokenizer: Tokenizer, template: Template, system: str,
             turns: Sequence[Message]) -> str:
    """Write a dialogue that ends with the user, control tokens by their names."""
    eos = tokenizer.piece(tokenizer.eos_id)
    opening = "".join(map(tokenizer.piece, tokenizer.opening)) if template.opens else ""
    text = ""
    for n, message in enumerate(turns):
        if message.role == "assistant":
            text += template.before + message.content + template.after + (template.end or eos)
            continue
        text += opening if n == 0 or template.restarts else ""
        parts = template.turn_parts(system if n == 0 else "", message.content, n == 0)
        text += "".join(eos if part is EOS else part for part in parts)
    return text


HEAD = """\
{%- macro trimmed(text) %}
    {{- text.rstrip() if text.startswith(('  ', '\\t')) else text.strip() }}
{%- endmacro %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = SYSTEM %}
{%- endif %}
"""


def jinja_of(tokenizer: Tokenizer, name: str, system: str) -> str:
    """Return a template in Jinja, so that `transformers` finds the very ids that were trained.

    system: what is told where a dialogue has no system text. "" if nobody wrote it in Jinja.
    """
    file = Path(__file__).parent / "chat" / f"{name}.jinja"
    if not file.exists():
        return ""
    opening = "".join(map(tokenizer.piece, tokenizer.opening))
    eos = tokenizer.piece(tokenizer.eos_id)
    # The space that opens a text is put there by the tokenizer only where nothing is in front.
    if opening and tokenizer.has_space_prefix:
        opening += " "
    source = HEAD + file.read_text(encoding="utf-8")
    for word, text in (("OPENING", opening), ("END", eos), ("SYSTEM", system)):
        literal = json.dumps(text, ensure_ascii=False)
        source = source.replace(f"= {word} ", f"= {literal} ").replace(f" {word} ", f" {literal} ")
    return source
