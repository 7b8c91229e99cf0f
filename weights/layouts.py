"""Layouts of model folders: Hugging Face's and Meta's."""
from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from formats.files import read_json
from model import ModelConfig
from weights.files import Source, Weights, read_bin, read_indexed, read_pickle, read_safetensors


def is_meta(path: Path) -> bool:
    return not (path / "config.json").is_file() and (path / "params.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """Read the shape of the model in folder `path`; what cannot be computed is refused by name."""
    path = Path(path)
    file = path / ("params.json" if is_meta(path) else "config.json")
    if not file.is_file():
        raise ValueError(f"{path}: no model folder: {what_instead(path)}")
    content = read_json(file)
    if is_meta(path) and content.get("vocab_size", -1) == -1:
        # Meta leaves it to the tokenizer; the embedding knows it as well
        tensors = read_pickle(path / "consolidated.00.pth")
        shape = tensors.get("tok_embeddings.weight", torch.empty(0)).shape
        content["vocab_size"] = shape[0] if shape else 0
    try:
        return meta_config(content) if is_meta(path) else huggingface_config(content)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error)[:400]}") from None


class Limit(NamedTuple):
    """What an entry of a config can be, if it is there and not null."""
    kind: type   # int; float, which may be written as a whole number; bool, str, dict
    low: float = 0
    high: float = 0


SIZE = Limit(int, 1, 10 ** 6)  # a product of three, in bytes, is still a size for torch
# The largest public models have 126 layers; to lay out a billion, before their weights are found
# not to be there, would take for ever.
LAYERS = Limit(int, 1, 500)
LENGTH = Limit(int, 1, 10 ** 9)
NORM_EPS = Limit(float, 1e-30, 1)
BASE = Limit(float, 1, 1e30)


def check_entries(entries: Mapping[str, Any], limits: Mapping[str, Limit], where: str = "") -> None:
    """Raise ValueError naming the first entry that is not what it can be."""
    for name, (kind, low, high) in limits.items():
        value = entries.get(name)
        if value is None:
            continue
        is_number = kind in (int, float)
        # type, not isinstance: true is no number
        if not (type(value) is kind or kind is float and type(value) is int) or (
                is_number and not low <= value <= high):
            wanted = f"{kind.__name__}{f' from {low} to {high}' if is_number else ''}"
            raise ValueError(f"{where}{name} is {str(value)[:80]}, expected {wanted}")


def what_instead(path: Path) -> str:
    """Say what a path is that is no model folder, and what to do about it."""
    if (path / "adapter_config.json").is_file():
        return ("a LoRA adapter; merge it into its base first (peft: merge_and_unload, then "
                "save_pretrained)")
    if path.suffix == ".gguf" or path.is_dir() and any(path.glob("*.gguf")):
        return ("a GGUF file; give the folder of the model that it was made from, or convert it "
                "(transformers: from_pretrained(FOLDER, gguf_file=NAME), then save_pretrained)")
    if path.parts[:1] == ("~",):
        return f"a shell leaves ~ behind = as it is; write {path.expanduser()}"
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return (f"no such folder; a name on the Hugging Face hub is downloaded first: "
                f"hf download {path} --local-dir FOLDER")
    return "it has no config.json (Hugging Face) and no params.json (Meta)"


def read_weights(path: str | Path) -> Weights:
    """Map the weights of the model in folder `path`, in whichever layout they are.

    Raises ValueError that says what is wrong with them.
    """
    path = Path(path)
    if is_meta(path):
        return read_meta(path)
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (path / name).is_file():
            return read(path / name)
        if (path / f"{name}.index.json").is_file():
            return read_indexed(path / f"{name}.index.json", read)
    raise ValueError(f"{path}: holds no weights: no model.safetensors, no pytorch_model.bin "
                     "and no index of either")


# ---------------------------------------------------------------------------------------------
# Hugging Face: config.json. The tensors have our names.

SUPPORTED_TYPES = ("llama", "mistral", "qwen2")
SIZES = {
    "hidden_size": SIZE, "num_hidden_layers": LAYERS, "num_attention_heads": SIZE,
    "vocab_size": SIZE, "intermediate_size": SIZE,
}
LIMITS = {
    **SIZES, "num_key_value_heads": SIZE, "head_dim": SIZE, "max_position_embeddings": LENGTH,
    "rms_norm_eps": NORM_EPS, "rope_theta": BASE, "rope_scaling": Limit(dict),
    "rope_parameters": Limit(dict), "tie_word_embeddings": Limit(bool),
    "attention_bias": Limit(bool), "mlp_bias": Limit(bool), "use_sliding_window": Limit(bool),
    "sliding_window": Limit(int, 0, 10 ** 9), "model_type": Limit(str), "hidden_act": Limit(str),
    "layer_types": Limit(list),
    # of a reward model that was trained here, run/models.py
    "score_mean": Limit(float, -1e9, 1e9), "score_std": Limit(float, 1e-9, 1e9),
}
ROPE_LIMITS = {
    "rope_type": Limit(str), "type": Limit(str), "rope_theta": BASE,
    "factor": Limit(float, 1e-3, 1e6), "low_freq_factor": Limit(float, 1e-3, 1e6),
    "high_freq_factor": Limit(float, 1e-3, 1e6), "original_max_position_embeddings": LENGTH,
}
# Entries that are read here, or refused by `unsupported` where they ask for too much.
UNDERSTOOD = {
    *SIZES, "model_type", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act",
    "attention_bias", "mlp_bias", "head_dim", "sliding_window", "layer_types", "pretraining_tp",
    "attention_dropout", "quantization_config", "use_sliding_window",
}
# Entries that do not change what the model computes.
INERT = set("""
    architectures dtype torch_dtype transformers_version use_cache initializer_range
    max_sequence_length name_or_path tokenizer_class bos_token_id eos_token_id pad_token_id
    unk_token_id sep_token_id cls_token_id decoder_start_token_id id2label label2id num_labels
    problem_type finetuning_task return_dict output_attentions output_hidden_states torchscript
    chunk_size_feed_forward unsloth_version max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences score_mean score_std holdout_accuracy max_window_layers
""".split())


def huggingface_config(c: dict) -> ModelConfig:
    """Translate the content of a config.json."""
    missing = [name for name in SIZES if c.get(name) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: not the config of a LLaMA")
    check_entries(c, LIMITS)
    for name in ("rope_scaling", "rope_parameters"):
        check_entries(c.get(name) or {}, ROPE_LIMITS, f"{name}: ")
    first_problem = next(unsupported(c), None)
    if first_problem:
        raise ValueError(f"{first_problem} is not supported")
    rope = rope_entries(c)
    return ModelConfig(
        dim=c["hidden_size"],
        n_layers=c["num_hidden_layers"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
        vocab_size=c["vocab_size"],
        ffn_dim=c["intermediate_size"],
        max_seq_len=context_of(c),
        # what is missing has transformers' default
        norm_eps=float(c.get("rms_norm_eps") or 1e-6),
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        rope_scaling=float(rope.get("factor", 1.0)),
        rope_llama3=llama3_rope(rope),
        head_dim=own_head_dim(c),
        # Qwen 2 has the three biases always; LLaMA's switch speaks of all four
        qkv_bias=c["model_type"] == "qwen2" or bool(c.get("attention_bias")),
        out_bias=c["model_type"] != "qwen2" and bool(c.get("attention_bias")))


def context_of(c: dict) -> int:
    return c.get("max_position_embeddings") or 2048


def own_head_dim(c: dict) -> int | None:
    """Return the size of a head where it is not what follows from width and number of heads."""
    size = c.get("head_dim")
    return None if size == c["hidden_size"] / c["num_attention_heads"] else size


def rope_entries(c: dict) -> dict:
    """Return what is said of rotary positions: in rope_parameters since transformers 5."""
    # both may be there, and either may be null
    return {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}


def rope_type(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


# The entries that each type of rotary scaling needs, beside the base.
ROPE_ENTRIES = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"},
}


def llama3_rope(rope: dict) -> tuple[float, float, int] | None:
    """Return which rotary pairs Llama 3.1's scaling slows down; None: it is not in use."""
    if rope_type(rope) != "llama3":
        return None
    return (rope["low_freq_factor"], rope["high_freq_factor"],
            rope["original_max_position_embeddings"])


def unsupported(c: dict) -> Iterator[str]:
    """Yield what a config.json asks for and this code cannot compute, in the words of the error."""
    if c.get("model_type") not in SUPPORTED_TYPES:
        yield f"model_type {c.get('model_type')!r:.80} (supported: {', '.join(SUPPORTED_TYPES)})"
    if c.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {c['hidden_act']!r}"
    for name in ("mlp_bias", "attention_dropout", "quantization_config"):
        if c.get(name):
            yield name
    yield from unsupported_rope(rope_entries(c))

    # Mistral's window does nothing in texts that fit into it; Qwen 2 has it switched off
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    if window is not None and window < context_of(c):
        yield (f"sliding_window {window} (within it attention is full: "
               "lower max_position_embeddings to it to use the model so)")
    if any(kind != "full_attention" for kind in c.get("layer_types") or []):
        yield f"layer_types {c['layer_types']}"
    if c.get("pretraining_tp", 1) not in (None, 1):
        yield f"pretraining_tp {str(c['pretraining_tp'])[:80]} (1 gives the same up to rounding)"

    # what is neither read nor known to be harmless may be anything, unless it is off
    known = UNDERSTOOD | INERT
    unknown = sorted(name for name, value in c.items()
                     if value and name not in known and not name.startswith("_"))
    if unknown:
        yield (f"the unknown entry {', '.join(unknown)} "
               "(remove it if the model is the same without it)")


def unsupported_rope(rope: dict) -> Iterator[str]:
    """Yield what is asked of rotary positions beyond a base, a factor and Llama 3.1's scaling."""
    kind = rope_type(rope)
    needed = ROPE_ENTRIES.get(kind)
    if needed is None:
        yield f"rope scaling of type {kind!r} (supported: {', '.join(ROPE_ENTRIES)})"
    elif rope.keys() - needed - {"rope_type", "type", "rope_theta"} or needed - rope.keys():
        yield f"rope scaling {rope}"
    elif None in (rope[name] for name in needed) or (
            kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]):
        yield f"rope scaling {rope}"


# ---------------------------------------------------------------------------------------------
# Meta: params.json, and consolidated.NN.pth, one for each rank of model parallelism

class MetaTensor(NamedTuple):
    """Our name for one of Meta's tensors."""
    name: str
    split: int | None  # axis along which the files divide it; None: every file holds the whole


META = {
    "tok_embeddings": MetaTensor("model.embed_tokens", split=1),
    "norm": MetaTensor("model.norm", split=None),
    "output": MetaTensor("lm_head", split=0),
    "attention_norm": MetaTensor("input_layernorm", split=None),
    "ffn_norm": MetaTensor("post_attention_layernorm", split=None),
    "attention.wq": MetaTensor("self_attn.q_proj", split=0),
    "attention.wk": MetaTensor("self_attn.k_proj", split=0),
    "attention.wv": MetaTensor("self_attn.v_proj", split=0),
    "attention.wo": MetaTensor("self_attn.o_proj", split=1),
    "feed_forward.w1": MetaTensor("mlp.gate_proj", split=0),
    "feed_forward.w2": MetaTensor("mlp.down_proj", split=1),
    "feed_forward.w3": MetaTensor("mlp.up_proj", split=0),
}
META_NEEDED = {"dim": SIZE, "n_layers": LAYERS, "n_heads": SIZE, "multiple_of": SIZE,
               "norm_eps": NORM_EPS}
META_LIMITS = {**META_NEEDED, "n_kv_heads": SIZE, "ffn_dim_multiplier": Limit(float, 1e-3, 1e3),
               "vocab_size": SIZE, "rope_theta": BASE, "max_seq_len": LENGTH,
               "max_batch_size": LENGTH}


def meta_config(p: dict) -> ModelConfig:
    """Translate the content of a params.json."""
    missing = [name for name in META_NEEDED if p.get(name) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    unknown = sorted(p.keys() - META_LIMITS)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not supported: not the params of a LLaMA 1 or 2")
    check_entries(p, META_LIMITS)

    # two thirds of 4 D, as SwiGLU has three matrices instead of two; then up to a round number
    ffn_dim = int((p.get("ffn_dim_multiplier") or 1) * int(2 * 4 * p["dim"] / 3))
    multiples = -(-ffn_dim // p["multiple_of"])
    return ModelConfig(
        dim=p["dim"],
        n_layers=p["n_layers"],
        n_heads=p["n_heads"],
        n_kv_heads=p.get("n_kv_heads") or p["n_heads"],
        vocab_size=p["vocab_size"],
        ffn_dim=multiples * p["multiple_of"],
        max_seq_len=p.get("max_seq_len") or meta_context(p),
        norm_eps=p["norm_eps"],
        rope_theta=float(p.get("rope_theta") or 10000.0))


def meta_context(p: dict) -> int:
    """Tell the context of a model by what tells it from the others: params.json does not say."""
    if (p.get("rope_theta") or 10000.0) > 10000:
        return 16384  # CodeLlama
    is_first_65b = p["dim"] == 8192 and not p.get("n_kv_heads")
    if p["norm_eps"] < 5e-6 or is_first_65b:
        return 2048  # LLaMA 1
    return 4096  # LLaMA 2


def read_meta(path: Path) -> Weights:
    """Map Meta's consolidated.NN.pth files.

    Every tensor is joined when it is asked for, q and k in Hugging Face's order of rows.
    """
    config = read_config(path)
    shards = read_meta_files(path)
    first_file, first_shard = next(iter(shards.items()))
    # which rows of a tensor rotary positions turn together depends on its number of heads
    turned = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}
    sources = {}
    for name, first in first_shard.items():
        if name == "rope.freqs":  # computed, not learnt
            continue
        place = re.fullmatch(r"(?:layers\.(?P<layer>\d+)\.)?(?P<kind>.+)\.weight", name)
        if not place or place["kind"] not in META:
            raise ValueError(f"{first_file}: tensor {name} is none of a LLaMA's")

        # what is joined later is checked now, so that a torn folder is refused before it is used
        ours = META[place["kind"]]
        check_meta_parts(name, ours.split, shards)
        parts = [shard[name] for shard in shards.values()]
        # a whole tensor stands in every file: the first one's serves
        shape = list(first.shape)
        if ours.split is None:
            parts = parts[:1]
        else:
            shape[ours.split] *= len(parts)
        layer = f"model.layers.{place['layer']}." if place["layer"] else ""
        read = partial(join, parts, ours.split or 0, turned.get(place["kind"], 0))
        sources[f"{layer}{ours.name}.weight"] = Source(first_file, tuple(shape), first.dtype, read)

    # a missing last file shows in the width of what the files have together
    embedding = sources.get("model.embed_tokens.weight")
    if embedding and embedding.shape[1] != config.dim:
        raise ValueError(
            f"{list(shards)[-1]}: tensor tok_embeddings.weight has {embedding.shape[1]} columns in "
            f"the {len(shards)} files up to this one, params.json says {config.dim}: "
            "files are missing, or too many")
    return Weights(path, sources)


def read_meta_files(path: Path) -> dict[Path, dict[str, Tensor]]:
    """Map consolidated.00.pth, consolidated.01.pth, ... without a gap."""
    # with no file at all, the first one is what is missing
    files = sorted(path.glob("consolidated.*.pth"))
    expected = [path / f"consolidated.{i:02d}.pth" for i in range(max(len(files), 1))]
    for file in expected:
        if file not in files:
            raise ValueError(f"{file}: no such file")
    return {file: read_pickle(file) for file in expected}


def check_meta_parts(name: str, split: int | None, shards: Mapping[Path, dict]) -> None:
    """Raise ValueError unless every file holds its part of a tensor, all parts of one shape."""
    first_file, first_shard = next(iter(shards.items()))
    dimensions = 1 if split is None else 2
    for file, shard in shards.items():
        if name not in shard:
            raise ValueError(f"{file}: tensor {name} is missing, but {first_file.name} has it")
        part = shard[name]
        if part.shape != first_shard[name].shape or part.dim() != dimensions:
            raise ValueError(f"{file}: tensor {name} has shape {tuple(part.shape)}, "
                             "which is no part of a model's")


def join(parts: Sequence[Tensor], axis: int, heads: int) -> Tensor:
    """Put the parts of a model-parallel tensor together.

    heads: of a q or k matrix, whose rows change places; 0: of none. Meta turns neighbouring rows
        of a head, Hugging Face's layout row i of its first half with row i of its second.
    """
    whole = torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]
    if not heads:
        return whole
    pairs = whole.unflatten(0, (heads, -1, 2))   # (heads E, D) -> (heads, E/2, 2, D)
    return pairs.transpose(1, 2).flatten(0, 2)   # -> (heads, 2, E/2, D) -> (heads E, D)
