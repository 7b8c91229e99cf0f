"""Layouts of model folders: Hugging Face (config.json) and Meta (params.json, consolidated.*.pth)."""
from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

from formats.files import read_json
from model import ModelConfig
from weights.files import Source, Weights, read_bin, read_indexed, read_pickle, read_safetensors

SUPPORTED_TYPES = ("llama", "mistral")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
UNDERSTOOD = {*SIZES, "model_type", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
              "rope_parameters", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "head_dim", "sliding_window",
              "layer_types", "pretraining_tp", "attention_dropout", "quantization_config"}
# Entries of config.json that do not change what the model computes.
INERT = set("""architectures dtype torch_dtype transformers_version use_cache initializer_range max_sequence_length name_or_path tokenizer_class
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id id2label label2id num_labels
    problem_type finetuning_task return_dict output_attentions output_hidden_states torchscript chunk_size_feed_forward unsloth_version
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    score_mean score_std holdout_accuracy""".split())
# Meta's name -> ours, and the axis along which model parallelism splits the tensor (None: every file holds the whole)
META = {"tok_embeddings": ("model.embed_tokens", 1), "norm": ("model.norm", None), "output": ("lm_head", 0),
        "attention_norm": ("input_layernorm", None), "ffn_norm": ("post_attention_layernorm", None),
        "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0), "attention.wv": ("self_attn.v_proj", 0),
        "attention.wo": ("self_attn.o_proj", 1), "feed_forward.w1": ("mlp.gate_proj", 0), "feed_forward.w2": ("mlp.down_proj", 1),
        "feed_forward.w3": ("mlp.up_proj", 0)}
META_PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size", "rope_theta",
               "max_seq_len", "max_batch_size"}


def is_meta(path: Path) -> bool:
    return not (path / "config.json").is_file() and (path / "params.json").is_file()


def read_config(path: str | Path) -> ModelConfig:
    """Read the shape of the model in folder `path`; whatever this code cannot compute is refused by name."""
    path = Path(path)
    file = path / ("params.json" if is_meta(path) else "config.json")
    if not file.is_file():
        raise ValueError(f"{path}: no model folder: it has no config.json (Hugging Face) and no params.json (Meta)")
    content = read_json(file)
    if is_meta(path) and content.get("vocab_size", -1) == -1:
        content["vocab_size"] = len(read_pickle(path / "consolidated.00.pth").get("tok_embeddings.weight", ()))
    try:
        return meta_config(content) if is_meta(path) else huggingface_config(content)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file}: {error}") from None


def huggingface_config(c: dict) -> ModelConfig:
    """Translate the content of a config.json."""
    missing = [name for name in SIZES if not isinstance(c.get(name), int)]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: not the config of a LLaMA")
    heads, context = c["num_attention_heads"], c.get("max_position_embeddings", 2048)
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = sorted(name for name, value in c.items() if value and name not in UNDERSTOOD | INERT and not name.startswith("_"))
    window = c.get("sliding_window")
    refused = [
        (c.get("model_type") not in SUPPORTED_TYPES, f"model_type {c.get('model_type')!r} (supported: {', '.join(SUPPORTED_TYPES)})"),
        (c.get("hidden_act", "silu") != "silu", f"hidden_act {c.get('hidden_act')!r}"),
        (c.get("attention_bias"), "attention_bias"), (c.get("mlp_bias"), "mlp_bias"),
        (kind not in ("default", "linear"), f"rope scaling of type {kind!r}"),
        (rope.keys() - {"rope_type", "type", "rope_theta", *(["factor"] if kind == "linear" else [])}, f"rope scaling {rope}"),
        (c.get("head_dim") not in (None, c["hidden_size"] // heads), f"head_dim {c.get('head_dim')} other than hidden_size / heads"),
        (window is not None and window < context,
         f"sliding_window {window} (within it attention is full: lower max_position_embeddings to it to use the model so)"),
        (set(c.get("layer_types") or []) - {"full_attention"}, f"layer_types {c.get('layer_types')}"),
        (c.get("pretraining_tp", 1) not in (None, 1), f"pretraining_tp {c.get('pretraining_tp')} (1 gives the same up to rounding)"),
        (c.get("attention_dropout"), "attention_dropout"), (c.get("quantization_config"), "quantization_config"),
        (unknown, f"the unknown entry {', '.join(unknown)} (remove it if the model is the same without it)"),
    ]
    for present, what in refused:
        if present:
            raise ValueError(f"{what} is not supported")
    return ModelConfig(
        dim=c["hidden_size"], n_layers=c["num_hidden_layers"], n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads,
        vocab_size=c["vocab_size"], ffn_dim=c["intermediate_size"], max_seq_len=context, norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or c.get("rope_theta") or 10000.0),
        tie_embeddings=bool(c.get("tie_word_embeddings", False)), rope_scaling=float(rope.get("factor", 1.0)))


def meta_config(p: dict) -> ModelConfig:
    """Translate the content of a params.json.

    It does not tell the context. Unless someone wrote a max_seq_len into it: CodeLlama, told by its rope_theta, has 16384;
    LLaMA 1, told by its norm_eps of 1e-6 (65B: by its size without grouped heads), 2048; LLaMA 2 4096.
    """
    missing = sorted({"dim", "n_layers", "n_heads", "multiple_of", "norm_eps"} - p.keys())
    unknown = sorted(p.keys() - META_PARAMS)
    if missing or unknown:
        raise ValueError(f"lacks {', '.join(missing)}" if missing else f"{', '.join(unknown)} is not supported: not the params of a LLaMA 1 or 2")
    theta, kv_heads = p.get("rope_theta") or 10000.0, p.get("n_kv_heads")
    first = p["norm_eps"] < 5e-6 or p["dim"] == 8192 and not kv_heads
    ffn_dim = int((p.get("ffn_dim_multiplier") or 1) * int(2 * 4 * p["dim"] / 3))
    return ModelConfig(
        dim=p["dim"], n_layers=p["n_layers"], n_heads=p["n_heads"], n_kv_heads=kv_heads or p["n_heads"], vocab_size=p["vocab_size"],
        ffn_dim=-(-ffn_dim // p["multiple_of"]) * p["multiple_of"], norm_eps=p["norm_eps"], rope_theta=float(theta),
        max_seq_len=p.get("max_seq_len") or (16384 if theta > 10000 else 2048 if first else 4096))


def join(parts: Sequence[Tensor], axis: int, heads: int) -> Tensor:
    """Put the parts of a model-parallel tensor together; with `heads`, bring rows that turn as neighbours into halves."""
    whole = torch.cat(list(parts), axis) if len(parts) > 1 else parts[0]
    return whole.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else whole


def read_meta(path: Path) -> Weights:
    """Map Meta's consolidated.NN.pth files; every tensor is joined when it is asked for, q and k in Hugging Face's row order."""
    config = read_config(path)
    files = sorted(path.glob("consolidated.*.pth"))
    for i, file in enumerate(files or [None]):
        if file != path / f"consolidated.{i:02d}.pth":
            raise ValueError(f"{path}/consolidated.{i:02d}.pth: no such file")
    shards = [read_pickle(file) for file in files]
    sources = {}
    for name, first in shards[0].items():
        if name == "rope.freqs":  # computed, not learnt
            continue
        place = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
        if not place or place[2] not in META:
            raise ValueError(f"{files[0]}: tensor {name} is none of a LLaMA's")
        ours, axis = META[place[2]]
        for file, shard in zip(files, shards):
            if name not in shard:
                raise ValueError(f"{file}: tensor {name} is missing, but {files[0].name} has it")
            if shard[name].shape != first.shape or first.dim() != (1 if axis is None else 2):
                raise ValueError(f"{file}: tensor {name} has shape {tuple(shard[name].shape)}, which is no part of a model's")
        shape = tuple(n * len(files) if i == axis else n for i, n in enumerate(first.shape))
        heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}.get(place[2], 0)
        parts = [shard[name] for shard in shards][:1 if axis is None else None]
        layer = f"model.layers.{place[1]}." if place[1] else ""
        sources[f"{layer}{ours}.weight"] = Source(files[0], shape, first.dtype, partial(join, parts, axis or 0, heads))
    embeddings = sources.get("model.embed_tokens.weight")
    if embeddings and embeddings.shape[1] != config.dim:
        raise ValueError(f"{files[-1]}: tensor tok_embeddings.weight has {embeddings.shape[1]} columns in the {len(files)} files "
                         f"up to this one, params.json says {config.dim}: files are missing, or too many")
    return Weights(path, sources)


def read_weights(path: str | Path) -> Weights:
    """Map the weights of the model in folder `path`, in whichever layout they are; ValueError says what is wrong with them."""
    path = Path(path)
    if is_meta(path):
        return read_meta(path)
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (path / name).is_file():
            return read(path / name)
        if (path / f"{name}.index.json").is_file():
            return read_indexed(path / f"{name}.index.json", read)
    raise ValueError(f"{path}: holds no weights: no model.safetensors, no pytorch_model.bin and no index of either")
