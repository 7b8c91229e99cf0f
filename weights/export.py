"""Model folders out, in the Hugging Face layout."""
from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterable, Mapping

from torch import Tensor, nn

from model import Transformer
from weights.files import write_safetensors
from weights.tokenizer import huggingface_files


def plan_shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, dict[str, Tensor]]:
    """Deal tensors out, in order, to files of at most `shard_bytes` (or one tensor) each: file name -> tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def config_json(model: nn.Module, bos_id: int, eos_id: int) -> dict:
    """Return the Hugging Face config.json of a model of ours."""
    config = model.config
    scaling = {"type": "linear", "factor": config.rope_scaling} if config.rope_scaling != 1.0 else {}
    common = {
        "model_type": "llama", "hidden_size": config.dim, "intermediate_size": config.ffn_dim, "vocab_size": config.vocab_size,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "rope_scaling": scaling or None,  # and for transformers since version 5:
        "rope_parameters": {"rope_type": "linear" if scaling else "default", "rope_theta": config.rope_theta, **scaling},
        "tie_word_embeddings": config.tie_embeddings, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "bos_token_id": bos_id, "eos_token_id": eos_id}
    common["rope_parameters"].pop("type", None)
    if isinstance(model, Transformer):
        return {"architectures": ["LlamaForCausalLM"], **common}
    # transformers reads the score at the last token that is not pad, so pad must not be EOS: 0 is <unk>, never produced
    return {"architectures": ["LlamaForSequenceClassification"], **common, "pad_token_id": 0,
            "id2label": {"0": "score"}, "label2id": {"score": 0}}


def save_pretrained(model: nn.Module, path: str | Path, tokenizer: Any = None, weights: Iterable[tuple[str, Tensor]] | None = None,
                    extra: Mapping | None = None, shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that `transformers` and `load_pretrained` load; a new folder appears whole or not at all.

    tokenizer: data.Tokenizer to put beside the weights.   extra: further entries for config.json.
    weights: in place of model.named_parameters(), name for name: a sharded model's, gathered one by one as they are written.
    shard_bytes: with more than this, the weights are cut into several files with an index.
    """
    path = Path(path)
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)
    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
    texts = {**(huggingface_files(tokenizer) if tokenizer else {}), "config.json": {**config_json(model, bos_id, eos_id), **(extra or {})}}
    if isinstance(model, Transformer):
        texts["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    parameters = dict(model.named_parameters())
    shards, stream = plan_shards(parameters, shard_bytes), iter(parameters.items() if weights is None else weights)
    for name, tensors in shards.items():
        write_safetensors(partial_path / name, tensors, (tensor for _, tensor in itertools.islice(stream, len(tensors))))
    if len(shards) > 1:
        total = sum(p.numel() * p.dtype.itemsize for p in parameters.values())
        places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        texts["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": places}
    for name, content in texts.items():
        (partial_path / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if tokenizer:
        shutil.copyfile(tokenizer.path, partial_path / "tokenizer.model")
    if not path.exists():
        os.rename(partial_path, path)
        return
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):  # without its config.json it is no model folder
        stale.unlink(missing_ok=True)
    for file in sorted(partial_path.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, path / file.name)
    partial_path.rmdir()
