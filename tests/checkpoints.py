"""Small checkpoints as people bring them: random weights, and a tokenizer of each kind with its files, made by transformers and tokenizers.

    python tests/checkpoints.py [FOLDER ...]     print a table of them against transformers; a FOLDER is a real checkpoint
"""

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import sentencepiece

SAMPLE = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, isn't it?",
    "def f(x):\n    return x ** 2  # squared\n\n\nprint(f(3))",
    "Привет, мир! Как дела? Γειά σου Κόσμε. 你好,世界。こんにちは。 नमस्ते दुनिया",
]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def weights(folder: Path, kind: str, vocab_size: int, **changes: Any) -> None:
    """Let transformers draw a model of a family and write it."""
    import torch
    import transformers

    shape = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
        "max_position_embeddings": 256, "initializer_range": 0.2, "vocab_size": vocab_size, "pad_token_id": None, **changes,
    }
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms, and biases, which start at zero
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = changes.get("eos_token_id")
    model.save_pretrained(folder)


def byte_level(controls: list[str], words: str | None = None, digits: bool = False, normal: bool = False, bos: str = "") -> Any:
    """Train a byte-level BPE as Llama 3 (words), SmolLM2 (digits), Qwen 2.5 (words, normal) and DeepSeek-LLM have it."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(bos)))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if words:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)])
    if normal:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(SAMPLE * 3, trainer)
    made.add_special_tokens(controls)
    if bos:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def write(folder: Path, made: Any, **settings: Any) -> None:
    """Write a tokenizer.json with its tokenizer_config.json."""
    made.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


META = Path(__file__).parents[2] / "shared" / "data" / "tokenizer" / "tokenizer.model"  # LLaMA's own; it may be absent


def sentencepiece_model(folder: Path) -> int:
    """Put a sentencepiece model into a folder, LLaMA's where it is at hand; return its number of pieces."""
    if META.exists():
        shutil.copy(META, folder / "tokenizer.model")
        return 32_000
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE * 3), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=400, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    return 400


def llama2(folder: Path) -> None:
    weights(folder, "Llama", sentencepiece_model(folder), eos_token_id=2, bos_token_id=1)


def llama3(folder: Path) -> None:
    controls = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made = byte_level(controls, LLAMA3_WORDS, bos="<|begin_of_text|>")
    write(folder, made, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3)
    ids = [made.token_to_id(name) for name in ("<|end_of_text|>", "<|eot_id|>")]
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}
    weights(folder, "Llama", made.get_vocab_size(), eos_token_id=ids, bos_token_id=made.token_to_id("<|begin_of_text|>"),
            rope_parameters=rope, head_dim=16, tie_word_embeddings=True)


def smollm2(folder: Path) -> None:
    made = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], digits=True)
    write(folder, made, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", chat_template=CHATML)
    end = made.token_to_id("<|im_end|>")
    weights(folder, "Llama", made.get_vocab_size(), eos_token_id=end, bos_token_id=end - 1, tie_word_embeddings=True,
            num_attention_heads=3, num_key_value_heads=1)


def qwen2(folder: Path) -> None:
    made = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], LLAMA3_WORDS.replace("{1,3}", ""), normal=True)
    write(folder, made, bos_token=None, eos_token="<|im_end|>", add_bos_token=False, chat_template=CHATML)
    ends = [made.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    weights(folder, "Qwen2", made.get_vocab_size() + 5, eos_token_id=ends, bos_token_id=None)


def deepseek(folder: Path) -> None:
    made = byte_level(["<|begin_of_text|>", "<|end_of_text|>"], r"[\r\n]|\s?\p{L}+|\s?\p{P}+|[一-龥]+|\p{N}+", digits=True, bos="<|begin_of_text|>")
    write(folder, made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")
    weights(folder, "Llama", made.get_vocab_size(), eos_token_id=made.token_to_id("<|end_of_text|>"), bos_token_id=None, attention_bias=True)


def tinyllama(folder: Path) -> None:
    """A sentencepiece model with added tokens and ChatML, as TinyLlama-Chat 0.3 has it."""
    size = sentencepiece_model(folder)
    added = {"<|im_start|>": size, "<|im_end|>": size + 1, "[PAD]": size + 2}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    decoder = {str(i): {"content": name, **plain} for name, i in {"<unk>": 0, "<s>": 1, "</s>": 2, **added}.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "legacy": False,
                "added_tokens_decoder": decoder, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights(folder, "Llama", size + 8, eos_token_id=[2, size + 1], bos_token_id=1)


def zephyr(folder: Path) -> None:
    """TinyLlama-Chat 1.0: sentencepiece alone, the roles are text."""
    size = sentencepiece_model(folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
                "chat_template": ZEPHYR}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights(folder, "Llama", size, eos_token_id=2, bos_token_id=1)


def mistral(folder: Path) -> None:
    """Mistral 0.3: [INST] is a control token. Here of a byte-level tokenizer, as in Nemo."""
    made = byte_level(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], LLAMA3_WORDS, bos="<s>")
    write(folder, made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=MISTRAL)
    weights(folder, "Mistral", made.get_vocab_size(), eos_token_id=made.token_to_id("</s>"), bos_token_id=made.token_to_id("<s>"),
            sliding_window=None, head_dim=20)


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "Llama 2": llama2, "Llama 3": llama3, "SmolLM2": smollm2, "Qwen2.5": qwen2, "DeepSeek-LLM": deepseek,
    "TinyLlama-Chat 0.3": tinyllama, "TinyLlama-Chat 1.0": zephyr, "Mistral": mistral,
}
SCRIPTS = {
    "Latin": "azAZÀɏ", "Greek": "ΑϿ", "Cyrillic": "АӿЀя", "Armenian": "ԱՖաֆ", "Hebrew": "את", "Arabic": "ءي", "Devanagari": "अह",
    "Thai": "กฮ", "Georgian": "აჰ", "Hangul": "가힣", "Kana": "ぁヺ", "Han": "一龥",
}
BETWEEN = [" ", " ", " ", "  ", "\n", "\n\n", "\t", ", ", ". ", "'s ", "-", "", "7", " 123456 ", "    ", "🙂", "é", "<s>", "</s>", "<|im_end|>",
           "<|eot_id|>", "[INST]", "\u00a0", "\u200b", "\r\n"]


def texts(n: int, seed: int = 0) -> list[str]:
    """Return texts in 12 scripts, with the spaces, digits and names of control tokens that tokenizers stumble over."""
    rng = random.Random(seed)
    found = []
    for i in range(n):
        letters = list(SCRIPTS.values())[i % len(SCRIPTS)]
        first, last = ord(letters[0]), ord(letters[1])
        words = ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8))) for _ in range(rng.randint(1, 9))]
        found.append(rng.choice(["", "", " ", "  ", "\n"]) + "".join(word + rng.choice(BETWEEN) for word in words))
    return found


# ---------------------------------------------------------------------------------------------
# The table

DIALOGUE = [{"role": "user", "content": "What is that?\n\nSay."}, {"role": "assistant", "content": "A tree.\nOr so."},
            {"role": "user", "content": "été: 12345 你好"}]


def row(name: str, folder: Path, work: Path) -> list[str]:
    """Hold one checkpoint against transformers: logits, ids of 2,000 texts, its chat template, what we write of it."""
    import torch
    import transformers

    from data import choose_template, encode_prompt, open_tokenizer
    from formats import Message
    from weights import load_pretrained, save_pretrained

    def logits(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits

    ours, model = open_tokenizer(folder), load_pretrained(folder)
    other = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.randint(3, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(tokens)
    ids = "sentencepiece's own"  # of a tokenizer.model transformers guesses the merges
    if not (folder / "tokenizer.model").exists():
        right = [ours.encode(text) == other.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts(2000)]
        ids = f"{sum(right)} of {len(right)} equal"
    messages = tuple(Message(**turn) for turn in DIALOGUE)
    chat = "brings none"
    if ours.own.name:
        expected = other.apply_chat_template(DIALOGUE, add_generation_prompt=True)["input_ids"]
        chat = f"{ours.own.name}: {'equal' if encode_prompt(ours, messages, ours.own.name) == expected else 'DIFFER'}"
    template = choose_template(ours.own.name or "plain", ours)
    save_pretrained(model, work, ours, template=template)
    again = transformers.AutoTokenizer.from_pretrained(work).apply_chat_template(DIALOGUE, add_generation_prompt=True)["input_ids"]
    same = "equal" if again == encode_prompt(ours, messages, template) else "DIFFER"
    return [name, f"{(found - logits(folder)).abs().max():.1e}", ids, chat,
            f"logits {(found - logits(work)).abs().max():.1e}, chat {same}"]


def main(folders: list[str]) -> None:
    """Print the table."""
    import tempfile

    columns = ["checkpoint", "logits, largest difference", "ids of texts in 12 scripts", "its chat template's ids", "our export in transformers"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    with tempfile.TemporaryDirectory() as work:
        made = {f"{name} (random weights)": make for name, make in CHECKPOINTS.items()}
        for number, name in enumerate((*made, *folders)):
            folder = Path(name) if name in folders else Path(work) / f"{number}"
            if name in made:
                folder.mkdir()
                made[name](folder)
            print("| " + " | ".join(row(name, folder, Path(work) / f"{number}-out")) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
