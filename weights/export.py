"""Model folders out, in the Hugging Face layout."""
from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any, Iterable, Mapping

import torch
from torch import Tensor, nn

from formats.files import names_to_disk, put_in_place, write_bytes, write_json
from model import ModelConfig, Transformer
from text.export import tokenizer_files
from text.templates import end_ids
from text.tokenizer import Tokenizer
from weights.files import write_safetensors


def plan_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """Deal tensors out, in order, to files of at most `shard_bytes`: file name -> tensors.

    A tensor that is larger gets a file of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        # no empty files: a tensor that fits nowhere takes the one it finds
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names, shards))


def config_json(model: nn.Module, bos_id: int | None, eos_id: int | list[int],
                dtype: torch.dtype | None) -> dict:
    """Return the Hugging Face config.json of a model of ours."""
    config = model.config
    is_scaled = config.rope_scaling != 1.0
    content = {
        "model_type": "llama",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        # rotary positions, for transformers up to version 4 ...
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        # ... and since version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.out_bias,
        "mlp_bias": False,
        "torch_dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    if is_scaled:
        scaling = rope_entries(config)
        content["rope_parameters"].update(scaling)
        if not config.rope_llama3:  # the first of the types had another name for it
            scaling["type"] = scaling.pop("rope_type")
        content["rope_scaling"] = scaling
    if config.head_dim:
        content["head_dim"] = config.head_dim
    family = "Llama"
    if config.qkv_bias and not config.out_bias:
        family = "Qwen2"
        content["model_type"] = "qwen2"
        content["use_sliding_window"] = False
        del content["attention_bias"], content["mlp_bias"]
    content["architectures"] = [f"{family}ForCausalLM"]
    if not isinstance(model, Transformer):
        content["architectures"] = [f"{family}ForSequenceClassification"]
        # transformers reads the score at the last token that is not pad. So pad must not be EOS,
        # or a finished answer would be read one token early: 0 is <unk>, which is never produced.
        content["pad_token_id"] = 0
        content["id2label"] = {"0": "score"}
        content["label2id"] = {"score": 0}
    return content


def rope_entries(config: ModelConfig) -> dict:
    """Return how rotary positions are scaled, in Hugging Face's words."""
    if not config.rope_llama3:
        return {"rope_type": "linear", "factor": config.rope_scaling}
    low, high, context = config.rope_llama3
    return {"rope_type": "llama3", "factor": config.rope_scaling, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": context}


def save_pretrained(model: nn.Module, path: str | Path, tokenizer: Tokenizer | None = None,
                    weights: Iterable[tuple[str, Tensor]] | None = None,
                    extra: Mapping | None = None, shard_bytes: int = 5_000_000_000,
                    template: str = "", dtype: torch.dtype | None = None) -> None:
    """Write a folder that `transformers` and `load_pretrained` load.

    tokenizer: the one to put beside the weights.   extra: further entries for config.json.
    weights: in place of model.named_parameters(), name for name: a sharded model's, gathered one
        by one as they are written.
    shard_bytes: with more than this, the weights are cut into several files with an index.
    template: the chat template that the tokenizer's files are to carry.
    dtype: of the weights in the files; None: as they are.
    A new folder appears whole or not at all.
    """
    path = Path(path)
    # 1. a fresh folder beside the place where it belongs
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)

    bos_id, eos_id = 1, 2
    texts: dict[str, Any] = {}
    if tokenizer:
        texts = tokenizer_files(tokenizer, template)
        bos_id, ends = tokenizer.bos_id, tokenizer.eos_ids
        if template:
            ends = end_ids(tokenizer, template)
        eos_id = ends[0] if len(ends) == 1 else list(ends)
    texts["config.json"] = {**config_json(model, bos_id, eos_id, dtype), **(extra or {})}
    if isinstance(model, Transformer):
        texts["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}

    shards = plan_shards(parameters_of(model, dtype), shard_bytes)
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = index_of(shards)

    # 2. everything that is text, then the weights, which carry the texts' checksums
    for name, content in texts.items():
        if isinstance(content, Path):
            write_bytes(partial_path / name, content.read_bytes())
        else:
            write_json(partial_path / name, content)
    values = model.named_parameters() if weights is None else weights
    stream = (tensor.to(dtype or tensor.dtype) for _, tensor in values)
    for name, tensors in shards.items():
        # one stream through all files, each of which takes as many as it holds
        beside = [partial_path / text for text in texts] if name == min(shards) else []
        write_safetensors(partial_path / name, tensors, itertools.islice(stream, len(tensors)),
                          beside)

    # 3. whole: now it may have its name
    replace_folder(partial_path, path)


def parameters_of(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the names of the parameters with the shapes and dtypes that they are written in."""
    # without values, which may be on other ranks
    return {name: torch.empty(parameter.shape, dtype=dtype or parameter.dtype, device="meta")
            for name, parameter in model.named_parameters()}


def index_of(shards: Mapping[str, Mapping[str, Tensor]]) -> dict:
    """Return the content of the index that goes with several files."""
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.numel() * tensor.dtype.itemsize
                for tensors in shards.values() for tensor in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": places}


def replace_folder(new: Path, path: Path) -> None:
    """Make folder `new` the folder `path`; what else stands in an old one stays."""
    if not path.exists():
        names_to_disk(new)
        put_in_place(new, path)
        return
    # An old folder is no model folder while this goes on: config.json leaves first and comes last.
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
        put_in_place(file, path / file.name)
    new.rmdir()
