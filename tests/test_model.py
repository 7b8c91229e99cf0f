"""The transformer against transformers' own, against itself without padding or cache."""

import math
from dataclasses import replace

import numpy
import pytest
import torch

import logprobs
from model import (
    Cache,
    RMSNorm,
    ScalarModel,
    Transformer,
    choose,
    derive,
    filter_logits,
    generate,
    generation_steps,
    last_scores,
    lay_out_rows,
    prefill,
    rope_table,
    rotate,
    row_uniforms,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)
from sampling import Places
from weights.initial import init_weights, random_weight, random_weights
from evaluation.chat import stream

PROMPTS = [[1, 5, 9], [1], [1, 7, 7, 7, 30, 2, 8]]
COLLIDES = (64_445, 141_894)  # rows of seed 0 whose derived seeds agree in their lowest 32 bits


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: padded right, padded left, whole."""
    tokens = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 7:] = False
    mask[1, :5] = False
    return tokens, mask


@pytest.mark.line(22)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1},
        {"n_kv_heads": 4},
        {"rope_theta": 500.0},
        {"tie_embeddings": True},
        {"rope_scaling": 3.0},
        {"vocab_size": 67, "norm_eps": 1e-3},
    ],
)
def test_logits_equal_transformers(config, changes):
    transformers = pytest.importorskip(
        "transformers", reason="transformers judges the logits; it is a development dependency"
    )
    config = replace(config, **changes)
    model = Transformer(config)
    init_weights(model, 3)
    theirs = transformers.LlamaForCausalLM(
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
            rope_parameters={
                "rope_type": "linear",
                "factor": config.rope_scaling,
                "rope_theta": config.rope_theta,
            },
        )
    )
    theirs.load_state_dict(model.state_dict())
    tokens = ragged()[0]
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.line(22)
def test_attention_against_plain_loops(config):
    """One layer recomputed in float64, token by token, head by head."""
    config = replace(config, n_layers=1)
    model = Transformer(config)
    init_weights(model, 5)
    tokens = torch.tensor([3, 8, 21, 8, 40])
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x, weight):
        return weight * x / (x.square().mean() + config.norm_eps).sqrt()

    def turn(x, t):
        half, out = len(x) // 2, x.clone()
        for i in range(half):
            angle = t * config.rope_theta ** (-2 * i / len(x))
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    size, group = config.dim // config.n_heads, config.n_heads // config.n_kv_heads
    layer = "model.layers.0."
    x = [w["model.embed_tokens.weight"][t] for t in tokens]
    h = [norm(v, w[layer + "input_layernorm.weight"]) for v in x]
    q, k, v = ([(w[f"{layer}self_attn.{n}_proj.weight"] @ u).split(size) for u in h] for n in "qkv")
    for t in range(len(tokens)):
        heads = []
        for head in range(config.n_heads):
            scores = torch.stack(
                [
                    turn(q[t][head], t) @ turn(k[s][head // group], s) / size**0.5
                    for s in range(t + 1)
                ]
            )
            heads.append(sum(p * v[s][head // group] for s, p in enumerate(scores.softmax(0))))
        y = x[t] + w[layer + "self_attn.o_proj.weight"] @ torch.cat(heads)
        z = norm(y, w[layer + "post_attention_layernorm.weight"])
        gate = w[layer + "mlp.gate_proj.weight"] @ z
        y = y + w[layer + "mlp.down_proj.weight"] @ (
            gate * torch.sigmoid(gate) * (w[layer + "mlp.up_proj.weight"] @ z)
        )
        logits = w["lm_head.weight"] @ norm(y, w["model.norm.weight"])
        torch.testing.assert_close(model(tokens[None])[0, t].double(), logits, atol=1e-5, rtol=0)


@pytest.mark.line(22)
def test_rotation_is_metas_with_the_rows_of_q_and_k_reordered(config):
    """Meta turns neighbouring pairs as complex numbers; the Hugging Face layout, ours, holds real parts before imaginary ones."""
    heads, size, time = config.n_heads, config.dim // config.n_heads, 9
    g = torch.Generator().manual_seed(0)
    meta_weight, x = (
        torch.randn(heads * size, config.dim, generator=g),
        torch.randn(time, config.dim, generator=g),
    )
    rows = [
        head * size + 2 * i + part
        for head in range(heads)
        for part in (0, 1)
        for i in range(size // 2)
    ]
    ours = rotate(
        (x @ meta_weight[rows].T).view(1, time, heads, size),
        rope_table(torch.arange(time)[None], config),
    )
    pairs = torch.view_as_complex((x @ meta_weight.T).view(time, heads, size // 2, 2).double())
    angles = torch.arange(time)[:, None] * config.rope_theta ** (
        -2 * torch.arange(size // 2).double() / size
    )
    theirs = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    ).flatten(2)
    torch.testing.assert_close(
        ours[0].flatten(1).double(), theirs.flatten(1)[:, rows], atol=1e-5, rtol=0
    )


@pytest.mark.line(6, 21)
def test_padding_never_matters(actor, critic):
    tokens, mask = ragged()
    logits, scalars = actor(tokens, mask), critic(tokens, mask)
    poisoned = actor(tokens.where(mask, 60), mask)
    for b in range(3):
        alone = tokens[b][mask[b]][None]
        torch.testing.assert_close(logits[b][mask[b]], actor(alone)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(scalars[b][mask[b]], critic(alone)[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(poisoned[b][mask[b]], logits[b][mask[b]])
    assert logits[~mask].abs().max() == 0 and scalars[~mask].abs().max() == 0


@pytest.mark.line(1, 12)
def test_token_logprobs_are_shifted_once(actor):
    tokens, mask = ragged()
    response = mask & (mask.cumsum(1) > 3)
    logprobs, entropy = token_logprobs_and_entropy(actor, tokens, mask, response, temperature=0.7)
    for b in range(3):
        row = tokens[b][mask[b]]
        for i, t in enumerate(mask[b].nonzero()[:, 0].tolist()):
            if i <= 2:
                assert logprobs[b, t] == 0 and entropy[b, t] == 0
                continue
            distribution = (actor(row[None, :i])[0, -1].double() / 0.7).softmax(
                0
            )  # sees tokens before i only
            assert logprobs[b, t].item() == pytest.approx(
                distribution[row[i]].log().item(), abs=1e-5
            )
            assert entropy[b, t].item() == pytest.approx(
                -(distribution * distribution.log()).sum().item(), abs=1e-5
            )
    torch.testing.assert_close(token_logprobs(actor(tokens), tokens), token_logprobs(actor, tokens))
    assert logprobs[~response].abs().max() == 0


@pytest.mark.line(15)
def test_logits_become_float32_before_the_softmax():
    """A log-softmax in bfloat16 would be off by up to 0.03 at -10 nats."""
    logits = (torch.randn(2, 5, 61, generator=torch.Generator().manual_seed(0)) * 5).bfloat16()
    tokens = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    logprobs = token_logprobs(logits, tokens)
    expected = logits.double().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs[:, 1:].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("read", ["logprobs", "entropy", "both"])
def test_logits_in_chunks_give_autograds_gradients(monkeypatch, rows, read):
    """7 tokens in chunks of so many rows, against a log-softmax in float64."""
    monkeypatch.setattr(logprobs, "CHUNK", rows * 61 + 5)
    g = torch.Generator().manual_seed(0)
    states, head = torch.randn(7, 16, generator=g), torch.randn(61, 16, generator=g)
    targets = torch.randint(0, 61, (7,), generator=g)
    by_logprob, by_entropy = torch.randn(2, 7, generator=g)

    def loss(chosen, entropy):
        return {
            "logprobs": (chosen * by_logprob).sum(),
            "entropy": (entropy * by_entropy).sum(),
            "both": (chosen * by_logprob + entropy * by_entropy).sum(),
        }[read]

    inputs = [states.double().requires_grad_(), head.double().requires_grad_()]
    exact = (inputs[0] @ inputs[1].T / 0.7).log_softmax(-1)
    expected = exact[range(7), targets], -(exact.exp() * exact).sum(-1)
    gradients = torch.autograd.grad(loss(*expected), inputs)

    ours = [states.requires_grad_(), head.requires_grad_()]
    found = logprobs.read_logprobs(*ours, targets, 0.7, with_entropy=True)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y.float(), atol=1e-5, rtol=1e-5)
    for x, y in zip(torch.autograd.grad(loss(*found), ours), gradients):
        torch.testing.assert_close(x, y.float(), atol=1e-5, rtol=1e-5)


def test_chunks_under_autocast(monkeypatch):
    """bfloat16 products, float32 sums: as near to float32 as bfloat16 can be, in any chunks."""
    g = torch.Generator().manual_seed(0)
    states, head = torch.randn(64, 32, generator=g), torch.randn(61, 32, generator=g)
    targets = torch.randint(0, 61, (64,), generator=g)
    gradients = {}
    for name, chunk, is_cast in (("exact", 10**6, False), ("one", 10**6, True), ("many", 300, True)):
        monkeypatch.setattr(logprobs, "CHUNK", chunk)
        inputs = [states.clone().requires_grad_(), head.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            found, _ = logprobs.read_logprobs(*inputs, targets, 1.0, with_entropy=False)
        assert found.dtype == torch.float32
        gradients[name] = torch.autograd.grad(found.sum(), inputs)
    for i in range(2):
        exact, one, many = (gradients[name][i] for name in ("exact", "one", "many"))
        assert one.dtype == torch.float32
        assert 1e-4 < (one - exact).norm() / exact.norm() < 0.02
        assert (many - one).norm() / exact.norm() < 0.01


def test_rows_in_any_order_and_lengths_in_any_mix(actor):
    """The stream puts short rows first; the grid that comes back is the caller's."""
    lengths = [5, 1, 9, 5, 12, 1, 9, 9]
    tokens = torch.randint(3, 61, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    mask[4::2] = mask[4::2].flip(1)  # some are padded on the left
    layout, places = lay_out_rows(tokens, mask)
    assert [(group.rows, group.length) for group in layout.groups] == [(2, 1), (2, 5), (3, 9), (1, 12)]
    assert sorted(places.tolist()) == mask.flatten().nonzero()[:, 0].tolist()
    logits = actor(tokens, mask)
    for row, length in enumerate(lengths):
        alone = actor(tokens[row][mask[row]][None])[0]
        torch.testing.assert_close(logits[row][mask[row]], alone, atol=1e-5, rtol=1e-5)
    where = mask & (torch.arange(12) % 2 == 0)
    torch.testing.assert_close(actor(tokens, mask, where), logits[where], atol=1e-6, rtol=1e-6)
    assert logits[~mask].abs().max() == 0


@pytest.mark.parametrize("kind", ["logits", "scalars"])
def test_the_last_layer_rewrites_the_tokens_that_are_asked_for(actor, critic, kind):
    """Logits, scalars and gradients are those of a whole forward; the rest stays behind."""
    model = actor if kind == "logits" else critic
    tokens, mask = ragged()
    where = mask & (tokens % 3 == 0)
    weights = torch.randn(where.shape, generator=torch.Generator().manual_seed(0))[where]
    rows = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    whole = model(tokens, mask)[where]
    asked = model(tokens, mask, where) if kind == "logits" else model(tokens, mask, where)[where]
    assert rows == [mask.sum(), mask.sum(), mask.sum(), where.sum()]
    torch.testing.assert_close(asked, whole, atol=1e-6, rtol=1e-6)
    gradients = [
        torch.autograd.grad((weights @ x.reshape(len(weights), -1).square()).sum(), list(model.parameters()))
        for x in (whole, asked)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_last_layer_reads_the_end_of_every_prompt_alone(actor):
    rows = []
    actor.model.layers[-1].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    generate(actor, [[1, 5, 9], [1, 5, 9], [1, 7, 9, 8, 3]], 3, temperature=0.0)
    assert rows == [2, 3, 3], "two prompts that differ, then a token of each of the three"


@pytest.mark.line(15, 22)
def test_norm_is_computed_in_float32():
    norm, x = (
        RMSNorm(64, 1e-5),
        (torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * 30).bfloat16(),
    )
    exact = (x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(norm.bfloat16()(x), exact)


def test_activation_checkpointing_keeps_less_and_gives_equal_gradients(actor):
    tokens, mask = ragged()

    def backward() -> tuple[int, list[torch.Tensor]]:
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.nbytes) or x, lambda x: x
        ):
            loss = token_logprobs(actor, tokens, mask).sum()
        gradients = torch.autograd.grad(loss, list(actor.parameters()))
        return sum(kept), gradients

    plain, plain_gradients = backward()
    actor.model.recompute = True
    less, gradients = backward()
    assert less < plain / 3 and all(torch.equal(x, y) for x, y in zip(gradients, plain_gradients))


def test_first_token_cannot_be_scored(actor):
    with pytest.raises(ValueError, match="no predecessor"):
        token_logprobs(actor, torch.tensor([[1, 2]]), None, torch.tensor([[True, True]]))


@pytest.mark.line(1)
def test_values_belong_to_the_state_before_the_token(critic):
    tokens, mask = ragged()
    response = mask & (mask.cumsum(1) > 3)
    values = token_values(critic, tokens, mask, response)
    for b in range(3):
        row = tokens[b][mask[b]]
        for i, t in enumerate(mask[b].nonzero()[:, 0].tolist()):
            expected = critic(row[None, :i])[0, -1].item() if i > 2 else 0.0
            assert values[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_offset_moves_real_tokens_only(config, critic):
    tokens, mask = ragged()
    before = critic(tokens, mask)
    critic.offset = -2.5
    moved = critic(tokens, mask)
    torch.testing.assert_close(moved[mask], before[mask] - 2.5, atol=1e-6, rtol=0)
    assert (moved[~mask] == 0).all()
    torch.testing.assert_close(critic(tokens), fresh(critic)(tokens) - 2.5)
    values = token_values(critic, tokens, mask, mask & (mask.cumsum(1) > 3))
    assert (values[~mask] == 0).all()
    assert "offset" not in critic.state_dict() and ScalarModel(config).offset == 0.0


def fresh(model: ScalarModel) -> ScalarModel:
    """The same weights, as a file would bring them."""
    copy = ScalarModel(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.line(4)
def test_score_is_read_at_the_last_real_token(critic):
    tokens, mask = ragged()
    scores = last_scores(critic, tokens, mask)
    for b in range(3):
        assert scores[b].item() == pytest.approx(
            critic(tokens[b][mask[b]][None])[0, -1].item(), abs=1e-5
        )


@pytest.mark.line(23)
def test_cached_greedy_equals_full_forward_greedy(actor):
    out = generate(actor, PROMPTS, 12, temperature=0.0)
    for prompt, new in zip(PROMPTS, out.tokens):
        row = list(prompt)
        for token in new:
            assert actor(torch.tensor([row]))[0, -1].argmax().item() == token
            row.append(token)


@pytest.mark.line(23)
def test_sampling_does_not_depend_on_the_batch(actor):
    together = generate(actor, PROMPTS, 20, seed=7, eos_id=5, rows=[4, 9, 2])
    alone = [
        generate(actor, [p], 20, seed=7, eos_id=5, rows=[row]) for p, row in zip(PROMPTS, (4, 9, 2))
    ]
    chunked = generate(actor, PROMPTS, 20, seed=7, eos_id=5, rows=[4, 9, 2], batch_size=2)
    assert together.tokens == [a.tokens[0] for a in alone] == chunked.tokens
    assert generate(actor, PROMPTS, 20, seed=8, eos_id=5, rows=[4, 9, 2]).tokens != together.tokens
    assert len({len(row) for row in together.tokens}) > 1, (
        "rows should end at different lengths, or compaction is not tested"
    )


@pytest.mark.line(12)
def test_sampler_logprobs_are_the_models(actor):
    out = generate(actor, PROMPTS, 15, temperature=1.3, top_k=20, seed=3)
    for prompt, new, logprobs in zip(PROMPTS, *out):
        expected = token_logprobs(actor, torch.tensor([prompt + new]), temperature=1.3)[
            0, len(prompt) :
        ]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.line(2)
def test_generation_ends_with_eos_included(actor):
    out = generate(actor, PROMPTS * 10, 30, seed=1, eos_id=5)
    ended = [row for row in out.tokens if 5 in row]
    assert ended and all(row.index(5) == len(row) - 1 for row in ended)
    assert all(len(row) == 30 for row in out.tokens if 5 not in row)
    assert all(len(row) == 30 for row in generate(actor, PROMPTS, 30, seed=1, eos_id=None).tokens)


def test_generation_has_read_the_whole_prompt(actor):
    """Two prompts that differ in nothing but their last token, alone and in a ragged batch."""
    prompts = [[1, 5, 9], [1, 5, 10], [7], [1, 7, 7, 7, 30, 2, 8]]
    caches = [Cache(9, 20) for _ in actor.model.layers]
    logits = prefill(actor, prompts, caches, [8, 0, 3, 4])
    out = generate(actor, prompts, 3, seed=2)
    for i, prompt in enumerate(prompts):
        whole = actor(torch.tensor([prompt]))[0, -1]
        torch.testing.assert_close(logits[i], whole, atol=1e-5, rtol=0)
        expected = whole.log_softmax(-1)[out.tokens[i][0]].item()
        assert out.logprobs[i][0] == pytest.approx(expected, abs=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_a_prompt_that_is_asked_several_times(actor):
    """Read once, and answered as if it had been asked alone, at any temperature."""
    prompts = [*PROMPTS, *PROMPTS[:2], *PROMPTS]
    temperatures = [1.0, 0.5, 1.3, 0.0, 2.0, 1.1, 1.0, 0.7]
    together = generate(actor, prompts, 12, temperatures, seed=3)
    for i, prompt in enumerate(prompts):
        alone = generate(actor, [prompt], 12, temperatures[i], seed=3, rows=[i])
        assert together.tokens[i] == alone.tokens[0]
        assert together.logprobs[i] == pytest.approx(alone.logprobs[0], abs=1e-5)
    assert len(set(map(tuple, together.tokens))) == len(prompts), "the test says nothing"


def test_a_row_that_has_ended_says_nothing_more(actor):
    """Not even while it waits in the batch to be dropped."""
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 30, 2, 8]] * 20
    noise = row_uniforms(0, range(60), 40)
    steps = list(generation_steps(actor, prompts, 40, 1.0, 0, 1.0, 5, noise))
    said: list[list[int]] = [[] for _ in prompts]
    for step in steps:
        for row, token in zip(step.rows.tolist(), step.tokens.tolist()):
            said[row].append(token)
    assert all(5 not in row[:-1] for row in said)
    assert all(row[-1] == 5 or len(row) == 40 for row in said)
    sizes = [len(step.rows) for step in steps]
    assert any(0.85 * a < b < a for a, b in zip(sizes, sizes[1:])), "no row waited"
    assert said == generate(actor, prompts, 40, eos_id=5).tokens
    for i, prompt in enumerate(prompts[:9]):
        assert said[i] == list(stream(actor, prompt, 40, eos_id=5, row=i))
    assert min(map(len, said)) < max(map(len, said))


@pytest.mark.line(23)
@pytest.mark.parametrize("size", [2, 7, 31])
def test_places_that_get_free_go_to_prompts_that_wait(actor, size):
    """What is drawn is the same as with a place for everyone; the batch stays as full as it pays."""
    prompts = [[1, 5, 9], [1], [1, 7, 7, 7, 30, 2, 8], [1, 5, 9]] * 8
    temperatures = [0.5 + 0.1 * (i % 7) for i in range(32)]
    whole = generate(actor, prompts, 30, temperatures, eos_id=5, seed=4)
    some = generate(actor, prompts, 30, temperatures, eos_id=5, seed=4, batch_size=size)
    assert some.tokens == whole.tokens and len(set(map(len, whole.tokens))) > 5
    for one, other in zip(some.logprobs, whole.logprobs):
        assert one == pytest.approx(other, abs=1e-5)
    noise = row_uniforms(4, range(32), 30)
    steps = list(generation_steps(actor, prompts, 30, torch.tensor(temperatures), 0, 1.0, 5, noise, None, size))
    sizes = [len(step.rows) for step in steps]
    begun = [len({row for step in steps[:n + 1] for row in step.rows.tolist()}) for n in range(len(steps))]
    assert max(sizes) == size and all(n > 0.85 * size for n, done in zip(sizes, begun) if done < 32)
    assert sum(sizes) == sum(map(len, whole.tokens))


def test_a_place_whose_answer_is_over_stays_within_the_cache():
    """It keeps step with the others, which may go on for long; the cache has 3 + 4 slots."""
    batch = Places([[1, 5, 9]] * 2, 2, most=4)
    for _ in range(6):
        batch.go_on([7, 8], (), None)
    assert batch.positions() == [6, 6] and not batch.active


def test_stop_ends_a_row_once(actor):
    """It is asked after each token, with all of a row's new ones, until it says so."""
    asked: list[tuple[int, ...]] = []

    def stop(ids: list[int]) -> bool:
        asked.append(tuple(ids))
        return ids[-1] % 7 == 0

    free = generate(actor, PROMPTS * 10, 25).tokens
    out = generate(actor, PROMPTS * 10, 25, stop=stop).tokens
    for row, whole in zip(out, free):
        ends = [n + 1 for n, token in enumerate(whole) if token % 7 == 0]
        assert row == whole[: ends[0] if ends else 25]
    assert not any(token % 7 == 0 for ids in asked for token in ids[:-1])
    assert set(asked) == {tuple(row[:n]) for row in out for n in range(1, min(len(row), 24) + 1)}
    # of a row that gets all its tokens, nobody has to be asked after the last one
    assert len(asked) == sum(min(len(row), 24) for row in out)
    both = generate(actor, PROMPTS * 10, 25, stop=stop, eos_id=5).tokens
    assert both == [row[: row.index(5) + 1] if 5 in row else row for row in out]


def test_sampling_frequencies(actor):
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(20_000, 1)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = choose(logits, uniforms, temperature=0.5, top_k=0, top_p=1.0)
    expected = torch.tensor([0.0, 2.0, 4.0]).softmax(0)
    torch.testing.assert_close(
        tokens.bincount(minlength=4)[:3] / 20_000, expected, atol=0.01, rtol=0
    )
    assert (tokens != 3).all()
    torch.testing.assert_close(logprobs, expected.log()[tokens])
    assert choose(logits[:1], torch.tensor([0.99999994]), 0.5, 0, 1.0)[0].item() == 2


def test_filters_keep_the_right_tokens():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    assert (filter_logits(logits, 2, 1.0) > -torch.inf).tolist() == [
        [True, True, True, False]
    ]  # a tie at the border stays
    assert (filter_logits(logits, 0, 0.5) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (filter_logits(logits, 0, 0.6) > -torch.inf).sum().item() == 2
    assert (filter_logits(logits, 1, 0.01) > -torch.inf).sum().item() == 1


def test_top_p_is_a_share_of_what_top_k_leaves():
    """Of 0.4 and 0.3 the first is more than half; of everything it is less."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert (filter_logits(logits, 2, 0.5) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (filter_logits(logits, 0, 0.5) > -torch.inf).tolist() == [[True, True, False, False]]
    tokens, _ = choose(logits.repeat(100, 1), torch.linspace(0, 0.99, 100), 1.0, 2, 0.5)
    assert (tokens == 0).all()


# ---------------------------------------------------------------------------------------------
# Noise


def test_derived_seeds_do_not_collide():
    keys = [
        (0, "a"),
        (0, "a", 0),
        (0, "a", "0"),
        (0, "ab"),
        (0, "a", "b"),
        (1, "a"),
        (0, 1),
        (0, "1"),
        (0, 1_000_003),
        (1, 0),
        (0,),
        (-1, 1),
    ]
    seeds = [derive(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, 3) == derive(numpy.int64(0), numpy.int32(3)) == derive(0, torch.tensor(3))
    assert derive(7, "head") == 1013837393615394227, "results of old runs can be had again"
    with pytest.raises(TypeError):
        derive(0, 1.0)


@pytest.mark.parametrize(
    "one,other",
    [
        ((0, 1_000_003), (1, 0)),
        ((2, 5), (0, 2_000_011)),
        ((3, 1_000_003), (4, 0)),
        ((0, 1), (1, 0)),
        ((0, COLLIDES[0]), (0, COLLIDES[1])),
    ],
)
def test_every_row_has_its_own_noise(one, other):
    """By seed * 1000003 + row, or by 32 bits of a seed, these were the same."""
    noise = [row_uniforms(seed, [row], 50) for seed, row in (one, other)]
    assert (noise[0] - noise[1]).abs().max() > 0.5
    assert torch.equal(noise[0], row_uniforms(one[0], [9, one[1]], 50)[1:])


def test_rows_that_32_bits_would_confuse():
    first, second = (derive(0, row) for row in COLLIDES)
    assert first != second and first % 2**32 == second % 2**32


def test_noise_is_uniform_and_grows_at_its_end():
    noise = row_uniforms(0, range(400), 100)
    assert noise.dtype == torch.float32 and noise.min() >= 0 and noise.max() < 1
    assert torch.histc(noise, 10, 0, 1).sub(4000).abs().max() < 250  # four standard deviations
    assert torch.equal(noise[:, :37], row_uniforms(0, range(400), 37))


def test_every_weight_is_drawn_by_its_name(config):
    """A third layer, or no head, changes nothing about the others."""
    shallow = dict(random_weights(Transformer(config), 0))
    deep = dict(random_weights(Transformer(replace(config, n_layers=3)), 0))
    scalar = dict(random_weights(ScalarModel(config), 0))
    shared = [name for name in shallow if "o_proj" not in name and "down_proj" not in name]
    assert all(torch.equal(shallow[name], deep[name]) for name in shared)
    assert all(torch.equal(scalar[name], shallow[name]) for name in scalar.keys() & shallow.keys())
    other_seed = dict(random_weights(Transformer(config), 1))
    assert not any(
        torch.equal(shallow[name], other_seed[name]) for name in shared if "norm" not in name
    )
    first, second = (shallow[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_a_fresh_head_is_no_row_of_the_embedding(config):
    config = replace(config, dim=256)
    head = random_weight("score.weight", (1, 256), config, 0)
    embedding = random_weight("model.embed_tokens.weight", (61, 256), config, 0)
    likeness = torch.cosine_similarity(head, embedding)  # (61,)
    assert likeness.abs().max() < 0.3
    assert torch.equal(head, dict(random_weights(ScalarModel(config), 0))["score.weight"])


def test_weights_have_the_size_that_is_promised(config):
    config = replace(config, dim=256, ffn_dim=512, n_layers=8)
    weights = dict(random_weights(Transformer(config), 0))
    layer = "model.layers.3."
    for name, expected in [
        ("model.embed_tokens", 1 / 16),
        (layer + "self_attn.q_proj", 1 / 16),
        (layer + "self_attn.o_proj", 1 / 64),
        (layer + "mlp.down_proj", 512**-0.5 / 4),
    ]:
        assert weights[name + ".weight"].std().item() == pytest.approx(expected, rel=0.03)
    assert (weights[layer + "input_layernorm.weight"] == 1).all()
    head = random_weight("score.weight", (1, 4095), config, 0)
    assert head.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_generation_refuses_what_does_not_fit(actor):
    with pytest.raises(ValueError, match="context is 64"):
        generate(actor, [[1] * 60], 5)
    with pytest.raises(ValueError, match="empty"):
        generate(actor, [[]], 5)
    assert generate(actor, [], 5).tokens == []


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"dim": 30}, "dim=30 must be a multiple"),
        ({"n_kv_heads": 3}, "n_kv_heads=3"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"max_seq_len": "64"}, "max_seq_len='64'"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_scaling": math.nan}, "rope_scaling=nan"),
    ],
)
def test_impossible_shapes(config, bad, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **bad)
