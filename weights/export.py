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


def config_json(model: nn.Module, bos_id: int, eos_id: int) -> dict:
    """Return the Hugging Face config.json of a model of ours."""
    config = model.config
    is_scaled = config.rope_scaling != 1.0
    content = {
        "architectures": ["LlamaForCausalLM"],
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
        "rope_scaling": {"type": "linear", "factor": config.rope_scaling} if is_scaled else None,
        # ... and since version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    if is_scaled:
        content["rope_parameters"].update(rope_type="linear", factor=config.rope_scaling)
    if not isinstance(model, Transformer):
        content["architectures"] = ["LlamaForSequenceClassification"]
        # transformers reads the score at the last token that is not pad. So pad must not be EOS,
        # or a finished answer would be read one token early: 0 is <unk>, which is never produced.
        content["pad_token_id"] = 0
        content["id2label"] = {"0": "score"}
        content["label2id"] = {"score": 0}
    return content


def save_pretrained(model: nn.Module, path: str | Path, tokenizer: Any = None,
                    weights: Iterable[tuple[str, Tensor]] | None = None,
                    extra: Mapping | None = None, shard_bytes: int = 5_000_000_000) -> None:
    """Write a folder that `transformers` and `load_pretrained` load.

    tokenizer: data.Tokenizer to put beside the weights.   extra: further entries for config.json.
    weights: in place of model.named_parameters(), name for name: a sharded model's, gathered one
        by one as they are written.
    shard_bytes: with more than this, the weights are cut into several files with an index.
    A new folder appears whole or not at all.
    """
    path = Path(path)
    # 1. a fresh folder beside the place where it belongs
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    partial_path.mkdir(parents=True)

    bos_id, eos_id = (tokenizer.bos_id, tokenizer.eos_id) if tokenizer else (1, 2)
    texts = huggingface_files(tokenizer) if tokenizer else {}
    texts["config.json"] = {**config_json(model, bos_id, eos_id), **(extra or {})}
    if isinstance(model, Transformer):
        texts["generation_config.json"] = {"bos_token_id": bos_id, "eos_token_id": eos_id}

    # 2. weights first, for the index is known after them; then everything that is text
    texts.update(write_weights(model, partial_path, weights, shard_bytes))
    for name, content in texts.items():
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (partial_path / name).write_text(text + "\n", encoding="utf-8")
    if tokenizer:
        shutil.copyfile(tokenizer.path, partial_path / "tokenizer.model")

    # 3. whole: now it may have its name
    put_in_place(partial_path, path)


def write_weights(model: nn.Module, folder: Path, weights: Iterable[tuple[str, Tensor]] | None,
                  shard_bytes: int) -> dict[str, dict]:
    """Write the safetensors files; return the index that goes with several: {its name: content}."""
    parameters = dict(model.named_parameters())
    shards = plan_shards(parameters, shard_bytes)
    # one stream through all files, each of which takes as many as it holds
    stream = (tensor for _, tensor in (parameters.items() if weights is None else weights))
    for name, tensors in shards.items():
        write_safetensors(folder / name, tensors, itertools.islice(stream, len(tensors)))
    if len(shards) == 1:
        return {}
    places = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    total = sum(parameter.numel() * parameter.dtype.itemsize for parameter in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return {"model.safetensors.index.json": index}


def put_in_place(new: Path, path: Path) -> None:
    """Make folder `new` the folder `path`; what else stands in an old one stays."""
    if not path.exists():
        os.rename(new, path)
        return
    # An old folder is no model folder while this goes on: config.json leaves first and comes last.
    for stale in (path / "config.json", *path.glob("model*.safetensors*")):
        stale.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, path / file.name)
    new.rmdir()
