"""Weights in and out: against `transformers`, against a Meta splitter written here, byte for byte, and against torn files."""

import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

import microcosm
from data import Tokenizer, open_tokenizer
from model import ModelConfig, ScalarModel, Transformer, generate, last_scores
from weights.initial import init_weights
from text.export import sentencepiece_files
from weights.export import save_pretrained
from weights.files import Weights, accept_changed, read_safetensors, write_safetensors
from formats.files import read_jsonl
from weights import layouts
from weights.layouts import read_config, read_weights
from weights.loading import check_weights, load_pretrained, stored_dtype


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
ROOT = Path(__file__).parents[1]
TOKENS = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "grouped": {},
    "one kv head": {"n_kv_heads": 1},
    "ungrouped": {"n_kv_heads": 4},
    "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 500.0, "norm_eps": 1e-3},
    "linear scaling": {"rope_scaling": 4.0},
    "odd vocabulary": {"vocab_size": 67},
    "all at once": {
        "n_kv_heads": 1,
        "tie_embeddings": True,
        "rope_theta": 1e6,
        "rope_scaling": 2.5,
        "vocab_size": 71,
    },
}


def theirs() -> object:
    return pytest.importorskip(
        "transformers", reason="transformers judges the files; it is a development dependency"
    )


def random_model(config: ModelConfig, kind: type = Transformer, seed: int = 3) -> torch.nn.Module:
    model = kind(config)
    init_weights(model, seed)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    microcosm.train_tokenizer(path, 640)
    return open_tokenizer(path)


# ---------------------------------------------------------------------------------------------
# Layouts: what others wrote


def huggingface_folder(config: ModelConfig, folder: Path, shard: str = "50GB") -> torch.Tensor:
    """Let transformers draw a model, write it and compute its logits."""
    transformers = theirs()
    rope = (
        {"rope_type": "linear", "factor": config.rope_scaling}
        if config.rope_scaling != 1
        else {"rope_type": "default"}
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            intermediate_size=config.ffn_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            initializer_range=0.2,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    with torch.no_grad():
        return model(TOKENS).logits


def pickled(folder: Path, files: int) -> None:
    """Turn a folder's safetensors into pytorch_model*.bin."""
    tensors = {
        name: tensor.clone()
        for name, tensor in read_safetensors(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    places = {
        name: f"pytorch_model-{i % files + 1:05d}-of-{files:05d}.bin"
        for i, name in enumerate(tensors)
    }
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def meta_folder(
    config: ModelConfig, tensors: dict[str, torch.Tensor], folder: Path, files: int, **params
) -> None:
    """Write Meta's layout from Hugging Face's, row by row: the way fairscale's column- and row-parallel layers split it."""
    size = config.dim // config.n_heads

    def interleave(
        x: torch.Tensor,
    ) -> torch.Tensor:  # pair (i, i + E/2) of a head becomes neighbours
        rows = []
        for head in range(len(x) // size):
            for i in range(size // 2):
                rows += [x[head * size + i], x[head * size + size // 2 + i]]
        return torch.stack(rows)

    def columns(x: torch.Tensor, part: int) -> torch.Tensor:
        width = x.size(1) // files
        return x[:, part * width : (part + 1) * width].clone()

    def rows(x: torch.Tensor, part: int) -> torch.Tensor:
        return columns(x.T, part).T.contiguous()

    folder.mkdir()
    for part in range(files):
        out = {
            "tok_embeddings.weight": columns(tensors["model.embed_tokens.weight"], part),
            "norm.weight": tensors["model.norm.weight"].clone(),
            "output.weight": rows(tensors["lm_head.weight"], part),
            "rope.freqs": torch.ones(size // 2),
        }
        for i in range(config.n_layers):
            ours = {
                name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): x
                for name, x in tensors.items()
                if f"layers.{i}." in name
            }
            layer = {
                "attention.wq": rows(interleave(ours["self_attn.q_proj"]), part),
                "attention.wk": rows(interleave(ours["self_attn.k_proj"]), part),
                "attention.wv": rows(ours["self_attn.v_proj"], part),
                "attention.wo": columns(ours["self_attn.o_proj"], part),
                "feed_forward.w1": rows(ours["mlp.gate_proj"], part),
                "feed_forward.w2": columns(ours["mlp.down_proj"], part),
                "feed_forward.w3": rows(ours["mlp.up_proj"], part),
                "attention_norm": ours["input_layernorm"].clone(),
                "ffn_norm": ours["post_attention_layernorm"].clone(),
            }
            out |= {f"layers.{i}.{name}.weight": x for name, x in layer.items()}
        torch.save(out, folder / f"consolidated.{part:02d}.pth")
    (folder / "params.json").write_text(
        json.dumps(
            {
                "dim": config.dim,
                "n_layers": config.n_layers,
                "n_heads": config.n_heads,
                "multiple_of": 32,
                "norm_eps": config.norm_eps,
                "vocab_size": -1,
                **params,
            }
        )
    )


@pytest.mark.line(22)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards"])
def test_what_transformers_wrote(config, tmp_path, shape, layout):
    config = replace(config, **SHAPES[shape])
    logits = huggingface_folder(
        config, tmp_path / "model", "20KB" if layout == "shards" else "50GB"
    )
    if "bin" in layout:
        pickled(tmp_path / "model", 1 + 2 * ("shards" in layout))
    assert len(
        [*(tmp_path / "model").glob("*.safetensors"), *(tmp_path / "model").glob("*.bin")]
    ) > ("shards" in layout)
    model = load_pretrained(tmp_path / "model")
    assert model.config == config
    torch.testing.assert_close(model(TOKENS), logits, atol=1e-4, rtol=0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_embeddings


@pytest.mark.line(22)
@pytest.mark.parametrize("files", [1, 2, 4])
def test_what_meta_wrote(config, tmp_path, files):
    config = replace(
        config,
        vocab_size=68,
        n_kv_heads=4 if files == 4 else 2,
        rope_theta=500.0,
        ffn_dim=96,
        max_seq_len=4096,
    )
    logits = huggingface_folder(config, tmp_path / "huggingface")
    tensors = dict(read_safetensors(tmp_path / "huggingface" / "model.safetensors"))
    meta_folder(
        config, tensors, tmp_path / "meta", files, n_kv_heads=config.n_kv_heads, rope_theta=500.0
    )
    model = load_pretrained(tmp_path / "meta")
    assert model.config == config
    torch.testing.assert_close(model(TOKENS), logits, atol=1e-4, rtol=0)
    assert all(
        torch.equal(tensor, tensors[name])
        for name, tensor in read_weights(tmp_path / "meta").items()
    )


def test_meta_shapes(tmp_path):
    """The params.json that Meta ships, and what they leave out."""
    base = {
        "dim": 4096,
        "multiple_of": 256,
        "n_heads": 32,
        "n_layers": 32,
        "norm_eps": 1e-06,
        "vocab_size": 32000,
    }
    large = {**base, "dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}
    for params, ffn, context, kv_heads in [
        (base, 11008, 2048, 32),
        ({**base, "norm_eps": 1e-5}, 11008, 4096, 32),
        ({**base, "norm_eps": 1e-5, "max_seq_len": 512}, 11008, 512, 32),
        (
            {**large, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_kv_heads": 8},
            28672,
            4096,
            8,
        ),
        (large, 22016, 2048, 64),
        (
            {**base, "norm_eps": 1e-5, "ffn_dim_multiplier": 1.0, "rope_theta": 1000000},
            11008,
            16384,
            32,
        ),
    ]:
        (tmp_path / "params.json").write_text(json.dumps(params))
        config = read_config(tmp_path)
        assert (config.ffn_dim, config.max_seq_len, config.n_kv_heads) == (ffn, context, kv_heads)
    assert config.rope_theta == 1e6


def test_metas_tokenizer_stands_one_folder_up(tokenizer, tmp_path):
    (tmp_path / "7B").mkdir()
    shutil.copyfile(tokenizer.path, tmp_path / "tokenizer.model")
    params = {"dim": 32, "n_layers": 1, "n_heads": 2, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": 640}
    (tmp_path / "7B" / "params.json").write_text(json.dumps(params))
    assert open_tokenizer(tmp_path / "7B").vocab_size == 640


def test_a_tensor_is_read_when_it_is_asked_for(config, tmp_path):
    save_pretrained(random_model(config), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = read_weights(tmp_path / "model")
    before = weights["model.norm.weight"].clone()
    with open(file, "r+b") as handle:
        handle.seek(
            -config.vocab_size * config.dim * 4 - config.dim * 4, os.SEEK_END
        )  # the norm stands before the last tensor
        handle.write(struct.pack("<f", 7.0))
    assert before[0] == 1 and weights["model.norm.weight"][0] == 7
    weights["model.norm.weight"].zero_()
    assert weights["model.norm.weight"][0] == 7, (
        "whoever writes to a mapped tensor writes to a copy"
    )


def test_a_tensor_can_be_added_to_those_of_a_file(config, tmp_path):
    """A language model becomes a scalar model by a head; the file's own tensors are as before."""
    save_pretrained(random_model(config), tmp_path / "model")
    weights = read_weights(tmp_path / "model")
    head = torch.randn(1, 32)
    more = weights.with_tensor("score.weight", head)
    assert isinstance(more, Weights) and more.keys() == weights.keys() | {"score.weight"}
    assert torch.equal(more["score.weight"], head) and "score.weight" not in weights
    assert torch.equal(more["model.norm.weight"], weights["model.norm.weight"])
    check_weights(ScalarModel(config), more)
    with pytest.raises(ValueError, match=r"score.weight has shape \(1, 31\)"):
        check_weights(ScalarModel(config), weights.with_tensor("score.weight", head[:, :31]))


# ---------------------------------------------------------------------------------------------
# Out and in again


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "rope_scaling": 2.0}])
@pytest.mark.parametrize(
    "kind,dtype",
    [(Transformer, torch.float32), (Transformer, torch.bfloat16), (ScalarModel, torch.float32)],
)
def test_save_load_save_is_stable(config, tokenizer, tmp_path, kind, dtype, changes, shard_bytes):
    model = random_model(replace(config, **changes), kind).to(dtype)
    save_pretrained(model, tmp_path / "once", tokenizer, shard_bytes=shard_bytes)
    loaded = load_pretrained(tmp_path / "once", dtype=dtype, kind=kind)
    assert loaded.config == model.config and torch.equal(loaded(TOKENS), model(TOKENS))
    save_pretrained(loaded, tmp_path / "twice", tokenizer, shard_bytes=shard_bytes)
    once = contents(tmp_path / "once")
    assert once == contents(tmp_path / "twice") and ("model.safetensors.index.json" in once) == (
        shard_bytes == 20_000
    )


def test_saving_over_a_folder_leaves_no_old_weights(config, tmp_path):
    save_pretrained(random_model(config), tmp_path / "model", shard_bytes=20_000)
    (tmp_path / "model" / "notes.txt").write_text("mine")
    save_pretrained(random_model(config, seed=4), tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes.txt",
    }
    assert torch.equal(
        load_pretrained(tmp_path / "model").lm_head.weight,
        random_model(config, seed=4).lm_head.weight,
    )


def test_sharded_ranks_read_and_write_the_same_bytes(config, tmp_path):
    """Two ranks, from every layout; what they write is what one process writes."""
    config = replace(config, max_seq_len=4096, ffn_dim=96, vocab_size=62)
    model = random_model(config)
    save_pretrained(model, tmp_path / "actor")
    save_pretrained(random_model(config, ScalarModel), tmp_path / "reward")
    for name in ("tied", "tied_blocks"):  # as one sharded unit, and block by block
        save_pretrained(random_model(replace(config, tie_embeddings=True)), tmp_path / name)
    meta_folder(config, dict(model.state_dict()), tmp_path / "meta", 2, n_kv_heads=2)
    shutil.copytree(tmp_path / "actor", tmp_path / "bin")
    pickled(tmp_path / "bin", 2)
    names = ["actor", "reward", "tied", "tied_blocks", "meta", "bin"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "tests" / "reload.py"),
            str(tmp_path / "out"),
            *(str(tmp_path / name) for name in names),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        expected = contents(tmp_path / ("actor" if name in ("meta", "bin") else name))
        assert contents(tmp_path / "out" / name) == expected, name


@pytest.mark.line(22)
def test_transformers_loads_what_we_write(config, tokenizer, tmp_path):
    """Offline, through the Auto classes: token ids, logits, greedy answers token by token, and scores."""
    transformers = theirs()
    config = replace(config, vocab_size=643, rope_scaling=2.0)
    actor, judge = random_model(config), random_model(config, ScalarModel)
    save_pretrained(actor, tmp_path / "actor", tokenizer, shard_bytes=50_000)
    save_pretrained(judge, tmp_path / "judge", tokenizer)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "actor")
    prompts = [item.prompt for item in microcosm.items("eval", 12, 0, 0.5)]
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    assert read(prompts)["input_ids"] == ids
    writer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    assert isinstance(writer, transformers.LlamaForCausalLM) and writer.dtype == torch.float32
    expected = generate(actor, ids, 20, temperature=0.0, eos_id=tokenizer.eos_id).tokens
    for prompt, row in zip(ids, expected):
        assert (
            writer.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            == row
        )
    rewarder = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert (
        isinstance(rewarder, transformers.LlamaForSequenceClassification)
        and rewarder.num_labels == 1
    )
    batch = read(prompts, padding=True, return_tensors="pt")
    scores = last_scores(judge, batch["input_ids"], batch["attention_mask"].bool())
    with torch.no_grad():
        torch.testing.assert_close(rewarder(**batch).logits[:, 0], scores, atol=1e-4, rtol=0)


SCALED = {"tie_embeddings": True, "rope_theta": 500.0, "rope_scaling": 2.5, "norm_eps": 1e-3}


@pytest.mark.parametrize("changes", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", [Transformer, ScalarModel])
def test_config_json_says_all_that_others_need(config, tokenizer, tmp_path, kind, changes):
    """Entry by entry, so that it is seen where nobody is there to load the folder."""
    config = replace(config, vocab_size=640, **changes)
    save_pretrained(random_model(config, kind), tmp_path / "model", tokenizer)
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    linear = {"type": "linear", "factor": 2.5}
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "vocab_size": 640,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3 if changes else 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500.0 if changes else 10000.0,
        "rope_scaling": linear if changes else None,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}
        if changes
        else {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": bool(changes),
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    if kind is ScalarModel:
        # <unk>, which no answer holds: at pad = EOS a finished answer would be read too early
        expected |= {
            "architectures": ["LlamaForSequenceClassification"],
            "pad_token_id": 0,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
        }
    assert content == expected
    assert content.get("pad_token_id") != content["eos_token_id"]


def test_transformers_reads_the_score_of_a_finished_answer_at_its_end(config, tokenizer, tmp_path):
    """Answers with their EOS, and cut-off ones, padded on the right: what a user would hand over."""
    transformers = theirs()
    judge = random_model(replace(config, vocab_size=640), ScalarModel)
    save_pretrained(judge, tmp_path / "judge", tokenizer)
    read = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    assert read.num_labels == 1
    eos = tokenizer.eos_id
    answers = [[1, 9, 30, 31, eos], [1, 9, 30, 31], [1, 9, eos], [1, 40, 41, 42, 43, 44, 45]]
    batch = torch.full((4, 7), read.config.pad_token_id)
    mask = torch.zeros(4, 7, dtype=torch.bool)
    for i, ids in enumerate(answers):
        batch[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = True
    expected = last_scores(judge, batch, mask)
    with torch.no_grad():
        scores = read(input_ids=batch, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert (expected[0] - expected[1]).abs() > 1e-2, (
        "the EOS makes no difference: nothing is tested"
    )


def test_transformers_reads_rotary_positions_and_ties(config, tmp_path):
    transformers = theirs()
    model = random_model(replace(config, **SCALED))
    save_pretrained(model, tmp_path / "model")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert read.lm_head.weight is read.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS).logits, model(TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True, "vocab_size": 420, "remove_extra_whitespaces": False},
        {"byte_fallback": True, "vocab_size": 420, "normalization_rule_name": "nfkc"},
    ],
)
def test_transformers_finds_the_same_ids(options, tmp_path):
    """Of any text, whatever a tokenizer was trained to do about spaces; LLaMA's pieces for runs of them have the lowest scores."""
    transformers = theirs()
    texts = [item.prompt for item in microcosm.items("train", 300, 0, 0.5)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + [f"{a}    {b}" for a, b in zip(texts, texts[1:])]),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        minloglevel=2,
        **{"normalization_rule_name": "identity", **options},
    )
    ours = open_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, content in sentencepiece_files(ours).items():
        (tmp_path / name).write_text(json.dumps(content))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    odd = [
        "",
        " ",
        "  ",
        " a",
        "a ",
        "a  b",
        "a   b\n\n    c",
        "\n",
        " \n ",
        "a</s>b",
        "<s>",
        "</s> <unk>",
        "caf\u00e9 \u65e5\u672c \U0001f642",
        "x\u2581y",
        "\ufb01ne",
    ]
    for text in texts + odd + [a + "   " + b for a, b in zip(texts, odd)]:
        assert read(text, split_special_tokens=True)["input_ids"] == [ours.bos_id, *ours.encode(text)], text


# ---------------------------------------------------------------------------------------------
# Files that do not serve


def test_safetensors_round_trip(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "b": torch.randn(4),
        "empty": torch.zeros(0, 3),
        "c": torch.tensor([1, 2]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(
        torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors
    )
    theirs = pytest.importorskip(
        "safetensors.torch",
        reason="the safetensors package judges the file; it is a development dependency",
    )
    assert all(
        torch.equal(v, tensors[k]) for k, v in theirs.load_file(tmp_path / "x.safetensors").items()
    )


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_torn_safetensors(tmp_path, keep):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.randn(4)})
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="torn.safetensors"):
        read_safetensors(tmp_path / "torn.safetensors")


def header(file: Path, change) -> None:
    """Rewrite the header of a safetensors file, its data as it is."""
    data = file.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8:start])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[start:])


def rewrite(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def resave(file: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in torch.load(file).items()}
    change(tensors)
    torch.save(tensors, file)


def cut(file: Path, share: float = 0.5) -> None:
    with open(file, "r+b") as handle:
        handle.truncate(int(file.stat().st_size * share))


class Code:
    """What a hostile pickle holds: a call."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
NORM, PROJ, DOWN = (
    "model.norm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)
TORN = {  # what happened to a folder: (layout, what to do, what the line must name)
    "no weights": ("one", lambda d: (d / "model.safetensors").unlink(), "holds no weights"),
    "missing shard": (
        "shards",
        lambda d: (d / SHARD).unlink(),
        rf"{SHARD}: no such file, .*tensor model\.layers",
    ),
    "cut shard": ("shards", lambda d: cut(d / SHARD), rf"{SHARD}: cut off.*tensor model\.layers"),
    "cut header": (
        "shards",
        lambda d: cut(d / SHARD, 0.01),
        f"{SHARD}: not a safetensors file, or cut off in its header",
    ),
    "empty shard": ("shards", lambda d: cut(d / SHARD, 0), f"{SHARD}: not a safetensors file"),
    "too long": (
        "one",
        lambda d: (d / "model.safetensors").open("ab").write(b"more"),
        "model.safetensors: 4 bytes after the last tensor",
    ),
    "index names a missing tensor": (
        "shards",
        lambda d: rewrite(d / INDEX, lambda c: c["weight_map"].update({"model.x.weight": SHARD})),
        rf"{SHARD}: tensor model\.x\.weight is missing, but {INDEX}",
    ),
    "index leaves a tensor out": (
        "shards",
        lambda d: rewrite(d / INDEX, lambda c: c["weight_map"].pop(NORM)),
        f"tensor {NORM} is missing",
    ),
    "index leaves the folder": (
        "shards",
        lambda d: rewrite(d / INDEX, lambda c: c["weight_map"].update({NORM: "../x"})),
        f"{INDEX}: has no weight_map",
    ),
    "index of nothing": ("shards", lambda d: (d / INDEX).write_text("[]"), f"{INDEX}: holds list"),
    "torn index": ("shards", lambda d: cut(d / INDEX), f"{INDEX}: not valid JSON"),
    "torn config": ("one", lambda d: cut(d / "config.json"), "config.json: not valid JSON"),
    "wrong shape": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].update(shape=[16, 64])),
        rf"model.safetensors: tensor {PROJ} has shape \(16, 64\)",
    ),
    "size is not shape": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].update(shape=[32, 33])),
        f"model.safetensors: tensor {PROJ}",
    ),
    "negative shape": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].update(shape=[-32, -32])),
        f"model.safetensors: tensor {PROJ}",
    ),
    "unknown type": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].update(dtype="F8_E4M3")),
        f"model.safetensors: tensor {PROJ}.*F8",
    ),
    "no type": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].pop("dtype")),
        f"model.safetensors: tensor {PROJ}",
    ),
    "integers": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h[PROJ].update(dtype="I32")),
        f"model.safetensors: tensor {PROJ} holds torch.int32",
    ),
    "overlap": (
        "one",
        lambda d: header(
            d / "model.safetensors",
            lambda h: h[NORM].update(
                data_offsets=h[DOWN]["data_offsets"][:1] + [h[DOWN]["data_offsets"][0] + 128]
            ),
        ),
        r"model.safetensors: tensor model\.\S+ overlaps",
    ),
    "hole": (
        "one",
        lambda d: header(d / "model.safetensors", lambda h: h.pop(DOWN)),
        "model.safetensors: tensor .* comes after a hole",
    ),
    "extra tensor": (
        "one",
        lambda d: header(
            d / "model.safetensors",
            lambda h: h.update(
                {"model.x.bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
            ),
        ),
        r"model.safetensors: tensor model\.x\.bias is none of this model's",
    ),
    "cut bin": ("bin", lambda d: cut(d / "pytorch_model.bin", 0.9), "pytorch_model.bin: cut off"),
    "empty bin": ("bin", lambda d: cut(d / "pytorch_model.bin", 0), "pytorch_model.bin: cut off"),
    "old bin": (
        "bin",
        lambda d: torch.save(
            torch.load(d / "pytorch_model.bin"),
            d / "pytorch_model.bin",
            _use_new_zipfile_serialization=False,
        ),
        "pytorch_model.bin: cut off, or not a file of torch.save since version 1.6",
    ),
    "code in bin": (
        "bin",
        lambda d: torch.save({NORM: Code(d / "executed")}, d / "pytorch_model.bin"),
        "pytorch_model.bin: .*never executed",
    ),
    "code in a bare pickle": (
        "bin",
        lambda d: (d / "pytorch_model.bin").write_bytes(pickle.dumps(Code(d / "executed"))),
        "pytorch_model.bin: ",
    ),
    "bin is a list": (
        "bin",
        lambda d: torch.save([1], d / "pytorch_model.bin"),
        "pytorch_model.bin: holds list",
    ),
    "bin of numbers": (
        "bin",
        lambda d: torch.save({NORM: 1}, d / "pytorch_model.bin"),
        f"pytorch_model.bin: entry {NORM} is int",
    ),
    "tensor missing in bin": (
        "bin",
        lambda d: resave(d / "pytorch_model.bin", lambda t: t.pop(NORM)),
        f"pytorch_model.bin: tensor {NORM} is missing",
    ),
    "cut pth": ("meta", lambda d: cut(d / "consolidated.01.pth"), "consolidated.01.pth: cut off"),
    "missing first pth": (
        "meta",
        lambda d: (d / "consolidated.00.pth").unlink(),
        "consolidated.00.pth: no such file",
    ),
    "missing last pth": (
        "meta",
        lambda d: (d / "consolidated.01.pth").unlink(),
        "consolidated.00.pth: tensor tok_embeddings.weight has 16 columns",
    ),
    "code in pth": (
        "meta",
        lambda d: torch.save({"norm.weight": Code(d / "executed")}, d / "consolidated.01.pth"),
        "consolidated.01.pth: .*never executed",
    ),
    "tensor missing in pth": (
        "meta",
        lambda d: resave(d / "consolidated.01.pth", lambda t: t.pop("output.weight")),
        "consolidated.01.pth: tensor output.weight is missing",
    ),
    "wrong shape in pth": (
        "meta",
        lambda d: resave(
            d / "consolidated.01.pth", lambda t: t.update({"output.weight": torch.ones(3, 32)})
        ),
        r"consolidated.01.pth: tensor output.weight has shape \(3, 32\)",
    ),
    "foreign tensor in pth": (
        "meta",
        lambda d: resave(
            d / "consolidated.00.pth",
            lambda t: t.update({"layers.0.attention.wq.bias": torch.ones(3)}),
        ),
        "consolidated.00.pth: tensor layers.0.attention.wq.bias is none",
    ),
    "foreign params": (
        "meta",
        lambda d: rewrite(d / "params.json", lambda c: c.update(use_scaled_rope=True)),
        "params.json: use_scaled_rope is not supported",
    ),
    "params lack": (
        "meta",
        lambda d: rewrite(d / "params.json", lambda c: c.pop("n_heads")),
        "params.json: lacks n_heads",
    ),
    "other heads": (
        "meta",
        lambda d: rewrite(d / "params.json", lambda c: c.update(n_heads=8, n_kv_heads=8)),
        r"pth: tensor \S+k_proj.weight has shape \(16, 32\)",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One model in every layout."""
    folder = tmp_path_factory.mktemp("whole")
    config = ModelConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=62, ffn_dim=96, max_seq_len=64
    )
    model = random_model(config)
    save_pretrained(model, folder / "one")
    save_pretrained(model, folder / "shards", shard_bytes=50_000)
    shutil.copytree(folder / "one", folder / "bin")
    pickled(folder / "bin", 1)
    meta_folder(config, dict(model.state_dict()), folder / "meta", 2, n_kv_heads=2)
    assert (folder / "shards" / SHARD).is_file()
    return folder


@pytest.mark.parametrize("case", TORN)
def test_torn_files(whole, tmp_path, case):
    layout, tear, expected = TORN[case]
    folder = tmp_path / layout
    shutil.copytree(whole / layout, folder)
    load_pretrained(folder)
    tear(folder)
    accept_changed(folder)  # as if nothing here had ever been summed
    with pytest.raises(ValueError, match=expected) as caught:
        load_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "executed").exists()


def test_train_says_it_in_one_line(whole, tokenizer, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole / "shards", folder)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    rewrite(
        folder / "config.json", lambda c: c.update(vocab_size=640, max_position_embeddings=2048)
    )
    accept_changed(folder)
    (tmp_path / "data.json").write_text('[{"instruction": "Say no.", "output": "No."}]')
    done = subprocess.run(
        [
            sys.executable,
            "train.py",
            f"--model={folder}",
            f"--out={tmp_path / 'run'}",
            "--stages=sft",
            f"--sft.data={tmp_path / 'data.json'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout.count("\n") == 1, "one line says where the run is"
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1
    assert (
        "model-00001-of-00003.safetensors: tensor model.embed_tokens.weight has shape (62, 32)"
        in done.stderr
    )


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
@pytest.mark.parametrize(
    "entry,expected",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 15}, "must be a multiple of 2"),
        ({"sliding_window": 32}, "sliding_window 32"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling {'rope_type': 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "'x': 1"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"pretraining_tp": 2}, "pretraining_tp 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"qk_norm": True}, "the unknown entry qk_norm"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is 32, expected int from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected int from 1"),
        ({"num_attention_heads": 5}, "must be a multiple of 2"),
        ({"vocab_size": True}, "vocab_size is True, expected int"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected int from 1 to 500"),
        ({"intermediate_size": 10**18}, "intermediate_size is 1000000"),
        ({"head_dim": 1e9}, "head_dim is 1000000000.0, expected int"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings is 64, expected int"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected float from"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, expected float"),
        ({"rope_theta": 0}, "rope_theta is 0, expected float"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters: rope_theta is -1.0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling: factor is 0.0"),
        ({"rope_scaling": "linear"}, "rope_scaling is linear, expected dict"),
        ({"rope_scaling": {"type": ["x"]}}, "rope_scaling: type is ..x.., expected str"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor is 1, expected fl"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "rope scaling {'rope_type'"),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, "rope scaling {'rope_type'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is no, expected bool"),
        ({"score_std": 0}, "score_std is 0, expected float"),
        ({"score_mean": "a"}, "score_mean is a, expected float"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(whole, tmp_path, entry, expected):
    shutil.copytree(whole / "one", tmp_path / "model")
    rewrite(
        tmp_path / "model" / "config.json",
        lambda c: [c.pop("rope_scaling"), c.pop("rope_parameters"), c.update(entry)],
    )
    accept_changed(tmp_path / "model")
    with pytest.raises(ValueError, match=expected) as caught:
        load_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


ANYTHING = [None, True, False, 0, -1, 1, 3, 1.5, -0.5, 1e-300, 1e9, 10**9, 10**18, 10**400, 1e308,
            math.nan, math.inf, "", "2", [], [1], [[1]], {}, {"a": 1}, {"rope_theta": "a"},
            {"rope_type": "linear", "factor": math.nan}, {"rope_type": ["x"]},
            {**LLAMA3, "original_max_position_embeddings": "x"}, "x" * 10_000]


def test_any_value_of_any_entry_is_taken_or_refused_in_a_line(whole, tmp_path):
    """No traceback, nothing that takes seconds; what is taken has a shape that can be laid out."""
    shutil.copytree(whole / "one", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    taken = set()
    for name in {*content, *layouts.UNDERSTOOD}:
        for value in ANYTHING:
            file.write_text(json.dumps({**content, name: value}))
            try:
                taken.add(read_config(tmp_path / "model"))
            except ValueError as error:
                assert str(error).startswith(str(file)) and len(str(error)) < 500, (name, value)
                assert "\n" not in str(error)
    for config in taken:
        with torch.device("meta"):
            Transformer(replace(config, n_layers=min(config.n_layers, 3)))
        assert 0 < config.norm_eps <= 1 <= config.rope_theta < math.inf
    assert 10 < len(taken) < 60


@pytest.mark.parametrize("entry", [{"norm_eps": -1}, {"n_layers": 10**9}, {"multiple_of": 0},
                                   {"dim": "x"}, {"n_heads": True}, {"ffn_dim_multiplier": math.nan},
                                   {"rope_theta": [1]}, {"vocab_size": 1.5}, {"max_seq_len": -1}])
def test_metas_params_have_limits_too(tmp_path, entry):
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5,
              "vocab_size": 61}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert read_config(tmp_path).n_layers == 2
    (tmp_path / "params.json").write_text(json.dumps({**params, **entry}))
    with pytest.raises(ValueError, match=f"params.json: {[*entry][0]} is "):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_too_deep_is_one_line(whole, tmp_path, name):
    shutil.copytree(whole / "one", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=f"{name}: not valid JSON") as error:
        load_pretrained(tmp_path / "model")
    assert len(str(error.value)) < 300
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="rows.jsonl:2: not valid JSON"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_harmless_entries_are_accepted(whole, tmp_path):
    """All that transformers writes for LLaMA and Mistral, and what older configs say of the same models."""
    shutil.copytree(whole / "one", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    rewrite(
        file,
        lambda c: c.update(
            {
                "_name_or_path": "llama",
                "max_sequence_length": 2048,
                "pretraining_tp": 1,
                "rope_scaling": None,
                "sliding_window": None,
                "unsloth_version": "1",
                "transformers_version": "4.31.0",
                "qk_norm": False,
            }
        ),
    )
    read_config(tmp_path / "model")
    rewrite(
        file,
        lambda c: c.update(sliding_window=4096, max_position_embeddings=4096, model_type="mistral"),
    )
    assert read_config(tmp_path / "model").max_seq_len == 4096
    transformers = theirs()
    for kind in (transformers.LlamaConfig, transformers.MistralConfig):
        shape = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "sliding_window": None,
        }
        file.write_text(json.dumps(kind(**shape).to_dict()))
        assert read_config(tmp_path / "model").n_kv_heads == 2


def test_no_model_folder(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="not the config of a LLaMA"):
        load_pretrained(tmp_path)


def test_old_checkpoints_hold_rotary_frequencies(config, tmp_path):
    save_pretrained(random_model(config), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(file).items()}
    write_safetensors(
        file, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    assert torch.equal(load_pretrained(tmp_path / "model")(TOKENS), random_model(config)(TOKENS))


@pytest.mark.parametrize(
    "name,file,expected",
    [
        ("adapter", "adapter_config.json", "a LoRA adapter; merge it"),
        ("quantised", "model-q4.gguf", "a GGUF file; give the folder"),
        ("empty", "notes.txt", "it has no config.json"),
    ],
)
def test_what_people_take_for_a_model_folder(tmp_path, name, file, expected):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).write_text("{}")
    with pytest.raises(ValueError, match=expected):
        read_config(tmp_path / name)


def test_names_that_are_no_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(ValueError, match="write /home/me/llama"):
        read_config("~/llama")
    with pytest.raises(ValueError, match="hf download meta-llama/Llama-3 --local-dir FOLDER"):
        read_config("meta-llama/Llama-3")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_go_out_in_another_dtype(config, tmp_path, dtype):
    """A float32 model in files of half the size: every number rounded once."""
    model = random_model(config)
    save_pretrained(model, tmp_path / "out", dtype=dtype)
    assert stored_dtype(tmp_path / "out") == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] in str(dtype)
    for name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name
