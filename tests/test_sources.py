"""Where the data of every stage comes from: what is held out reaches no stage, the path on real
files, rewards as functions, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import data
import golden
import parallel
import train
from formats import Message
from formats.files import read_jsonl
from model import ScalarModel, Transformer, generate
from run import folder, opening, settings, sources
from run.sources import prompt_key
from weights import load_pretrained
from weights.files import accept_changed

LENGTHS = ["--data.template=plain", "--data.max_prompt_tokens=60", "--data.max_response_tokens=12"]
SMALL = [
    "--sft.batch_size=16",
    "--sft.epochs=1",
    "--sft.lr=1e-3",
    "--reward.batch_size=4",
    "--ppo.batch_size=8",
    "--ppo.minibatch_size=8",
    "--ppo.iterations=2",
]
WORDS = ["cat", "dog", "cow", "hen", "fox", "owl", "plum", "fig", "pear", "lime"]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Sixty different prompts with answers, one of them three times, differently spaced."""
    folder_ = tmp_path_factory.mktemp("files")
    prompts = [f"Copy: {a} {b}" for a in WORDS for b in WORDS[:6]]
    prompts += ["Copy:  cat cat", "Copy: cat cat "]
    rows = [
        {"prompt": prompt, "response": prompt.removeprefix("Copy:").strip()} for prompt in prompts
    ]
    write(folder_ / "prompts.jsonl", rows)
    (folder_ / "length.py").write_text(
        "def score(prompt, response, answer):\n    return len(response) + (response == answer)\n"
    )
    return folder_


@pytest.fixture(scope="module")
def real(finished, files, tmp_path_factory) -> Path:
    """A whole run on files with a function that ranks and judges."""
    out = tmp_path_factory.mktemp("runs") / "real"
    train.main(
        [
            f"--model={finished[0] / 'sft'}",
            f"--out={out}",
            *LENGTHS,
            *SMALL,
            f"--sft.data={files / 'prompts.jsonl'}",
            f"--ppo.prompts={files / 'prompts.jsonl'}",
            f"--reward.function={files / 'length.py'}",
            "--eval.holdout=8",
            "--reward.sampled_prompts=30",
            "--ppo.iterations=12",
        ]
    )
    return out


def open_run(out: Path, *flags: str) -> tuple[folder.Run, sources.Source]:
    """Look into a run, under other settings where flags say so: nothing is written."""
    if (out / "config.json").exists():
        given, _ = settings.parse_flags([f"--out={out}", *flags])
        earlier = settings.config_from_file(out / "config.json")
        config = settings.unflatten({**earlier, "resume": False, **given})
    else:
        config = settings.parse_args([f"--out={out}", *flags], train.STAGES)
    machine = parallel.Machine(0, 1, torch.device("cpu"), torch.float32)
    run = folder.Run(config, machine, out, folder.prepare_tokenizer(config, out))
    return run, sources.open_source(run)


def normal(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------
# Held out


def test_no_stage_is_handed_a_held_out_prompt(real, files):
    """Held out and handed out are disjoint and together the file; duplicates are on one side."""
    held = {normal(row["prompt"]) for row in read_jsonl(real / "heldout.jsonl")}
    assert len(held) == 8
    everything = {normal(row["prompt"]) for row in read_jsonl(files / "prompts.jsonl")}
    run, source = open_run(real)
    trained = {prompt_key(prompt) for prompt in source.prompts_to_train()}
    assert not held & trained and held | trained == everything
    assert {prompt_key(record) for record in source.dialogues()} == trained
    sampled = {normal(row["prompt"]) for row in read_jsonl(real / "to_rank.jsonl")}
    assert sampled <= trained and len(sampled) >= 29
    drawn = {normal(row["prompt"]) for row in read_jsonl(real / "samples.jsonl")}
    assert drawn <= trained
    asked = {normal(row["prompt"]) for row in read_jsonl(real / "answers.jsonl")}
    assert asked == held


def test_the_choice_does_not_depend_on_order_and_is_made_once(real, files, tmp_path):
    rows = read_jsonl(files / "prompts.jsonl")
    turned = write(tmp_path / "turned.jsonl", rows[::-1])
    held = {prompt_key(sources.prompt_of(row, "")) for row in read_jsonl(real / "heldout.jsonl")}
    # a later run on this one, with other files and another number, holds out the same prompts
    run, source = open_run(
        tmp_path / "later",
        f"--base={real}",
        f"--ppo.prompts={turned}",
        "--eval.holdout=3",
        "--stages=ppo",
    )
    (tmp_path / "later").mkdir()
    source.choose_heldout()
    assert source.heldout_keys == held and not (tmp_path / "later" / "heldout.jsonl").exists()
    # a run of its own chooses by hash: the same 8 in whatever order they stand
    records = run_records(turned)
    assert {prompt_key(record) for record in sources.smallest_hashes(records, 8)} == held
    assert {prompt_key(r) for r in sources.smallest_hashes(records[::-1], 3)} < held


def run_records(path: Path):
    import formats

    return formats.read_prompts([str(path)])[0]


def test_prompts_given_for_the_evaluation_are_left_out_of_training(finished, files, tmp_path):
    chosen = write(tmp_path / "eval.jsonl", [{"prompt": "Copy: fox dog"}, {"prompt": "Copy: owl"}])
    out = tmp_path / "run"
    out.mkdir()
    run, source = open_run(
        out,
        f"--model={finished[0] / 'sft'}",
        *LENGTHS,
        "--stages=ppo",
        f"--ppo.prompts={files / 'prompts.jsonl'}",
        f"--eval.prompts={chosen}",
    )
    source.choose_heldout()
    assert [prompt.text for prompt in source.heldout()] == ["Copy: fox dog", "Copy: owl"]
    trained = {prompt.text for prompt in source.prompts_to_train()}
    assert "Copy: fox dog" not in trained and len(trained) == 61


def test_holding_out_after_sft_is_said(finished, files, tmp_path, capsys):
    """SFT of an earlier command may have seen them; before it there is nothing to say."""
    said = []
    for name, done in (("early", ()), ("late", ("sft",))):
        out = tmp_path / name
        out.mkdir()
        (out / "config.json").write_text('{"config": {}}')
        for result in done:
            shutil.copytree(finished[0] / result, out / result)
        _, source = open_run(
            out, f"--model={finished[0] / 'sft'}", *LENGTHS, "--stages=ppo",
            f"--ppo.prompts={files / 'prompts.jsonl'}", "--eval.holdout=8")
        source.choose_heldout()
        said.append("held out only now, after SFT" in capsys.readouterr().out)
    assert said == [False, True]


def test_nothing_held_out_is_no_evaluation(finished, files, tmp_path):
    """No prompt is held out, or all are: neither is an evaluation on training prompts."""
    flags = [
        f"--model={finished[0] / 'sft'}",
        f"--out={tmp_path / 'a'}",
        *LENGTHS,
        f"--ppo.prompts={files / 'prompts.jsonl'}",
        "--eval.holdout=0",
        "--stages=eval",
    ]
    with pytest.raises(ValueError, match="the evaluation needs prompts that no stage has seen"):
        train.main(flags)
    with pytest.raises(ValueError, match="60 different prompts and --eval.holdout=60"):
        train.main([*flags[:-2], "--eval.holdout=60", "--stages=eval", f"--out={tmp_path / 'b'}"])


def test_the_worlds_evaluation_asks_nothing_twice(finished):
    rows = read_jsonl(finished[0] / "heldout.jsonl")
    assert len({row["prompt"] for row in rows}) == len(rows) >= 40


def test_held_out_rankings_share_no_prompt_with_the_others():
    ranked = [
        sources.Ranked(data.TokenizedRanking([1, i % 7], [[3], [4]], [1, 2]), "") for i in range(40)
    ]
    held, rest = train.hold_out(ranked, 0.3)
    prompts = [{tuple(one.ranking.prompt) for one in part} for part in (held, rest)]
    assert not prompts[0] & prompts[1] and len(prompts[0]) == 2 and len(held) + len(rest) == 40
    with pytest.raises(ValueError, match="too few"):
        train.hold_out(ranked[:1], 0.1)


# ---------------------------------------------------------------------------------------------
# What earlier runs left


def test_the_tokenizer_comes_from_the_base(finished, tmp_path, monkeypatch):
    def other(path, vocab_size):
        raise AssertionError("the base's models know the base's pieces")

    monkeypatch.setattr(folder.microcosm, "train_tokenizer", other)
    train.main([f"--base={finished[0]}", f"--out={tmp_path / 'b'}", "--stages=eval"])
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == (
        finished[0] / "tokenizer.model"
    ).read_bytes()


def test_ranks_belong_to_the_prompt_in_the_file(finished, tmp_path):
    """A base of another seed, with other prompts: its responses are ranked against its prompts."""
    train.main(
        [
            f"--base={finished[0]}",
            f"--out={tmp_path / 'b'}",
            "--stages=annotate",
            "--seed=7",
            "--reward.sampled_prompts=11",
        ]
    )
    rows = read_jsonl(tmp_path / "b" / "ranked.jsonl")
    assert len(rows) == 40
    run, _ = open_run(tmp_path / "b")
    judge = sources.microcosm.rubric.score
    right = wrong = 0
    for row in rows:
        gold = [judge(row["prompt"], text, row["answer"]) for text in row["responses"]]
        for i in range(5):
            for j in range(i):
                if abs(gold[i] - gold[j]) > 0.3:  # three deviations of the annotator's error
                    agrees = (gold[i] > gold[j]) == (row["ranks"][i] < row["ranks"][j])
                    right, wrong = right + agrees, wrong + (not agrees)
    assert right > 20 * wrong and right > 10


def test_settings_of_another_version_are_named_and_left(finished, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(finished[0], base)
    content = json.loads((base / "config.json").read_text())
    content["config"]["ppo.forgotten"] = 3
    del content["crc32"]
    (base / "config.json").write_text(json.dumps(content))
    config = settings.parse_args([f"--base={base}", "--stages=eval"], train.STAGES)
    assert config.model.dim == 32
    assert "this version has no setting ppo.forgotten=3" in capsys.readouterr().err


def test_without_git_a_run_starts(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert opening.git_revision() is None


# ---------------------------------------------------------------------------------------------
# Dialogues


def test_annotators_and_evaluation_see_the_whole_dialogue(finished, tmp_path):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Copy: cat"},
        {"role": "assistant", "content": "cat"},
    ]
    rows = [
        {"messages": [*turns, {"role": "user", "content": f"Copy: {word} {other}"}]}
        for word in WORDS
        for other in WORDS[:3]
    ]
    path = write(tmp_path / "dialogues.jsonl", rows)
    out = tmp_path / "run"
    train.main(
        [
            f"--model={finished[0] / 'sft'}",
            f"--out={out}",
            *LENGTHS,
            "--stages=sample",
            f"--ppo.prompts={path}",
            "--eval.holdout=5",
            "--reward.sampled_prompts=4",
        ]
    )
    for name in ("to_rank.jsonl", "heldout.jsonl"):
        for row in read_jsonl(out / name):
            assert row["prompt"][:3] == turns and row["prompt"][3]["content"].startswith("Copy: ")
            prompt = sources.prompt_of(row, name)
            assert len(prompt.messages) == 4 and "assistant: cat" in prompt.text


# ---------------------------------------------------------------------------------------------
# The reward model


def test_a_reward_model_with_another_tokenizer_or_a_short_context_is_refused(finished, tmp_path):
    out = finished[0]
    other = tmp_path / "other"
    shutil.copytree(out / "reward", other)
    sources.microcosm.train_tokenizer(other / "tokenizer.model", 600)
    accept_changed(other)
    with pytest.raises(ValueError, match="is not the actor's"):
        train.main(
            [
                f"--base={out}",
                f"--out={tmp_path / 'b'}",
                "--stages=reward",
                f"--reward.model={other}",
            ]
        )
    short = tmp_path / "short"
    shutil.copytree(out / "reward", short)
    content = json.loads((short / "config.json").read_text())
    content["max_position_embeddings"] = 64
    (short / "config.json").write_text(json.dumps(content))
    accept_changed(short)
    with pytest.raises(ValueError, match="exceeds the context of --reward.model"):
        train.main(
            [
                f"--base={out}",
                f"--out={tmp_path / 'c'}",
                "--stages=reward",
                f"--reward.model={short}",
            ]
        )


def test_calibration_is_on_samples_of_the_policy(finished, tmp_path, monkeypatch):
    """Of the policy, not of whoever wrote the ranked responses, though there are no PPO prompts."""
    pairs = [
        {"prompt": f"Copy: {a} {b}", "chosen": f"{a} {b}", "rejected": b}
        for a in WORDS
        for b in WORDS[:4]
    ]
    path = write(tmp_path / "pairs.jsonl", pairs)
    seen = {}
    calibrate = train.reward.calibrate

    def look(scores):
        seen["scores"] = scores
        return calibrate(scores)

    monkeypatch.setattr(train.reward, "calibrate", look)
    out = tmp_path / "run"
    train.main(
        [
            f"--model={finished[0] / 'sft'}",
            f"--out={out}",
            *LENGTHS,
            *SMALL,
            "--stages=reward",
            f"--reward.data={path}",
        ]
    )
    run, source = open_run(out, "--stages=reward")
    _, rest = train.hold_out(source.rankings(), 0.1)
    prompts = [list(ranking.prompt) for ranking, _ in rest]
    seed = train.derive(0, "calibration")
    drawn = generate(load_pretrained(finished[0] / "sft"), prompts, 12, eos_id=2, seed=seed).tokens
    model = load_pretrained(out / "reward", kind=ScalarModel)
    with torch.no_grad():
        expected = [model(torch.tensor([p + r]))[0, -1].item() for p, r in zip(prompts, drawn)]
    assert seen["scores"] == pytest.approx(expected, abs=1e-4)


def test_the_critic_starts_as_the_calibrated_reward_model(finished, tmp_path, monkeypatch):
    """Its values are scores: neither their deviation nor their mean is off."""
    out = finished[0]
    (tmp_path / "b").mkdir()
    run, source = open_run(tmp_path / "b", f"--base={out}", "--stages=ppo")
    from run.models import open_reward, ppo_models

    critic = ppo_models(run).critic
    prompts = source.prompts_to_train()[:16]
    rows = [[*prompt.ids, 5, 6, 2] for prompt in prompts]
    scores = open_reward(run).score(prompts, [[5, 6, 2]] * 16)
    with torch.no_grad():
        values = torch.stack([critic(torch.tensor([row]))[0, -1] for row in rows])
    torch.testing.assert_close(values, scores, atol=1e-5, rtol=0)
    scale = json.loads((out / "reward" / "config.json").read_text())
    assert abs(scale["score_mean"] / scale["score_std"]) > 0.05, "or nothing is tested"


# ---------------------------------------------------------------------------------------------
# A reward as a function


def test_a_function_ranks_and_judges(real):
    for row in read_jsonl(real / "ranked.jsonl"):
        best = min(row["ranks"])
        longest = max(len(text) + (text == row["answer"]) for text in row["responses"])
        for text, rank in zip(row["responses"], row["ranks"]):
            assert (rank == best) == (len(text) + (text == row["answer"]) == longest)
    for row in read_jsonl(real / "answers.jsonl"):
        assert row["values"]["score"] == len(row["response"]) + (row["response"] == row["answer"])
    results = json.loads((real / "eval.json").read_text())
    answers = [
        row["values"]["score"]
        for row in read_jsonl(real / "answers.jsonl")
        if row["model"] == "ppo"
    ]
    mean = results["models"]["ppo"]["in_domain"]["score"]
    assert mean == pytest.approx(sum(answers) / len(answers))


def test_a_function_alone_is_enough(finished, files, tmp_path):
    """No SFT, no rankings, no reward model: PPO from --model, the best of three, the evaluation."""
    out = tmp_path / "run"
    train.main(
        [
            f"--model={finished[0] / 'sft'}",
            f"--out={out}",
            *LENGTHS,
            *SMALL,
            "--ppo.lr=1e-3",
            "--stages=ppo,eval",
            f"--ppo.prompts={files / 'prompts.jsonl'}",
            "--eval.best_of=3",
            f"--reward.function={files / 'length.py'}",
            "--eval.holdout=8",
        ]
    )
    results = json.loads((out / "eval.json").read_text())
    assert list(results["models"]) == ["base", "best-of-3", "ppo"]
    assert results["reference"] == "base" and list(results["changes"]) == ["best-of-3", "ppo"]
    scores = {name: model["in_domain"]["score"] for name, model in results["models"].items()}
    assert scores["best-of-3"] > scores["base"]
    rows = [row for row in read_jsonl(out / "metrics.jsonl")]
    samples = read_jsonl(out / "samples.jsonl")
    assert len(rows) == 2 and not (out / "reward").exists()
    assert all(
        row["score"] == len(row["response"]) + 0.0 or row["score"] > len(row["response"])
        for row in samples
    )


BAD_FUNCTIONS = [
    ("", "defines neither score"),
    (
        "def score(prompt, response, answer):\n    raise KeyError('x')",
        "score raised KeyError: 'x' for the prompt 'Copy: ",
    ),
    (
        "def score(prompt, response, answer):\n    return float('nan')",
        "gave nan, expected a finite number, for the prompt 'Copy: ",
    ),
    (
        "def score(prompt, response, answer):\n    return 'high'",
        "gave 'high', expected a finite number",
    ),
    (
        "def score(prompt, response, answer):\n    return None",
        "gave None, expected a finite number",
    ),
    (
        "def score_batch(prompts, responses, answers):\n    return [1.0]",
        "must return one number for each of the",
    ),
    (
        "def score_batch(prompts, responses, answers):\n    return 1.0",
        "must return one number for each of the",
    ),
    ("def score(prompt, response):\n    return 1.0", "score raised TypeError"),
    ("def score(prompt, response, answer) return 1", "cannot be run: SyntaxError"),
    ("import no_such_module", "cannot be run: ModuleNotFoundError"),
]


@pytest.mark.parametrize(
    "code,message", BAD_FUNCTIONS, ids=[message for _, message in BAD_FUNCTIONS]
)
def test_bad_functions_get_one_line(finished, files, tmp_path, code, message):
    path = tmp_path / "bad.py"
    path.write_text(code + "\n")
    with pytest.raises(ValueError) as error:
        train.main(
            [
                f"--model={finished[0] / 'sft'}",
                f"--out={tmp_path / 'run'}",
                *LENGTHS,
                *SMALL,
                "--stages=ppo",
                f"--ppo.prompts={files / 'prompts.jsonl'}",
                f"--reward.function={path}",
                "--eval.holdout=8",
            ]
        )
    text = str(error.value)
    assert message in text and str(path) in text and "\n" not in text


def test_a_function_that_cannot_be_loaded_stops_the_run_before_sft(finished, files, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def rate(response):\n    return 1\n")
    with pytest.raises(ValueError, match="defines neither score"):
        train.main([f"--model={finished[0] / 'sft'}", f"--out={tmp_path / 'run'}", *LENGTHS, *SMALL,
                    f"--sft.data={files / 'prompts.jsonl'}", f"--reward.function={path}",
                    "--stages=sft"])
    assert not (tmp_path / "run" / "sft").exists()


def test_a_function_with_metrics_and_batches(tmp_path):
    from formats import Prompt
    from reward import RewardFunction

    path = tmp_path / "f.py"
    path.write_text(
        "def score_batch(prompts, responses, answers):\n"
        "    return [len(r) + (r == a) for r, a in zip(responses, answers)]\n"
        "def metrics(prompt, response, answer):\n"
        "    return {'words': len(response.split()), 'right': response == answer}\n"
    )
    function = RewardFunction(path)
    prompts = [Prompt((Message("user", "a"),), "", "bb"), Prompt((Message("user", "c"),), "")]
    assert function(prompts, ["bb", "d e"]) == [3.0, 3.0]
    assert function.metrics(prompts, ["bb", "d e"]) == [
        {"words": 1.0, "right": 1.0},
        {"words": 2.0, "right": 0.0},
    ]


# ---------------------------------------------------------------------------------------------
# Advantages without a critic


@pytest.mark.parametrize("advantage", ["group", "leave_one_out"])
def test_without_a_critic_none_is_built_or_logged(finished, tmp_path, monkeypatch, advantage):
    built = []
    load = parallel.build

    def look(kind, config, weights, machine, frozen=False):
        built.append((kind, frozen))
        return load(kind, config, weights, machine, frozen)

    monkeypatch.setattr(parallel, "build", look)
    out = tmp_path / "b"
    train.main(
        [
            f"--base={finished[0]}",
            f"--out={out}",
            "--stages=ppo",
            f"--ppo.advantage={advantage}",
            "--ppo.responses_per_prompt=4", "--ppo.critic_warmup=2",
        ]
    )
    assert (ScalarModel, False) not in built and (Transformer, False) in built
    rows = read_jsonl(out / "metrics.jsonl")
    critics = {"explained_variance", "value_loss", "critic_grad_norm", "return_mean"}
    assert len(rows) == 3 and all(not critics & row.keys() for row in rows)
    assert "approx_kl" in rows[0], "nothing warms up"
    assert rows[-1]["approx_kl"] > 0, "the actor learns"
    with pytest.raises(ValueError, match="set --ppo.responses_per_prompt to 2 or more"):
        settings.parse_args([f"--ppo.advantage={advantage}"], train.STAGES)


def test_a_group_stands_together_and_every_prompt_comes_once(finished, tmp_path, monkeypatch):
    """Whoever draws: the episodes of a prompt are neighbours, each with noise of its own."""
    (tmp_path / "b").mkdir()
    run, source = open_run(
        tmp_path / "b",
        f"--base={finished[0]}",
        "--stages=ppo",
        "--ppo.advantage=group",
        "--ppo.responses_per_prompt=4",
    )
    prompts = source.prompts_to_train()
    assert len(prompts) == 3 * 16 // 4
    asked: list[tuple[int, str]] = []

    def look(models, episodes, rows, *rest):
        asked.extend(zip(rows, (prompt.source for prompt in episodes), strict=True))

    monkeypatch.setattr(train.ppo, "collect", look)
    for iteration in range(3):
        for rank in range(2):
            machine = parallel.Machine(rank, 2, torch.device("cpu"), torch.float32)
            train.roll_out(
                dataclasses.replace(run, machine=machine),
                train.ppo.Models(None, None),
                None,
                train.episodes_of(run, prompts, iteration),
                iteration,
            )
    assert [row for row, _ in asked] == list(range(48)), "no noise comes twice"
    names = [name for _, name in asked]
    groups = [names[i : i + 4] for i in range(0, 48, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == sorted(prompt.source for prompt in prompts)


# ---------------------------------------------------------------------------------------------
# What each stage is handed


def test_rankings_of_held_out_prompts_are_left_out(real, files, tmp_path):
    rows = read_jsonl(files / "prompts.jsonl")
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "x"} for row in rows]
    path = write(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "b").mkdir()
    run, source = open_run(
        tmp_path / "b", f"--base={real}", f"--reward.data={path}", "--stages=reward"
    )
    held = {tuple(prompt.ids) for prompt in source.heldout()}
    ranked = {tuple(one.ranking.prompt) for one in source.rankings()}
    assert len(held) == 8 and len(ranked) >= 50 and not held & ranked


def test_with_both_the_model_pays_and_the_function_judges(real, files, tmp_path):
    def is_functions(row, score):
        return score == len(row["response"]) + (row["response"] == row["prompt"][6:].strip())

    rows = read_jsonl(real / "samples.jsonl")
    assert not all(is_functions(row, row["score"]) for row in rows)
    from run.models import open_reward

    (tmp_path / "b").mkdir()
    for kind, is_model in (("auto", True), ("model", True), ("function", False)):
        flags = [f"--base={real}", "--stages=ppo", f"--ppo.reward={kind}"]
        run, source = open_run(tmp_path / "b", *flags)
        assert (open_reward(run).model is not None) == is_model


def test_the_annotators_error_belongs_to_prompt_and_response(finished, tmp_path):
    """Equal texts get equal ranks in any order; another prompt, or another seed, another error."""
    from formats import Prompt
    from run.annotation import rank

    (tmp_path / "b").mkdir()
    flags = [f"--base={finished[0]}", "--stages=annotate", "--reward.noise=1"]
    run, _ = open_run(tmp_path / "b", *flags)
    other_run, _ = open_run(tmp_path / "b", *flags, "--seed=1")

    def none(prompts, texts):
        return [0.0] * len(texts)

    texts = ["a", "b", "c", "d", "e", "f", "a"]
    prompts = [Prompt((Message("user", text),), "") for text in ("one", "two")]
    ranks = rank(run, none, prompts[0], texts)
    assert ranks[0] == ranks[-1] and len(set(ranks)) == 6
    assert rank(run, none, prompts[0], texts[::-1]) == ranks[::-1]
    assert rank(run, none, prompts[1], texts) != ranks
    assert rank(other_run, none, prompts[0], texts) != ranks


def test_score_batch_keeps_the_order(tmp_path):
    from formats import Prompt
    from reward import RewardFunction

    path = tmp_path / "f.py"
    path.write_text(
        "def score_batch(prompts, responses, answers):\n"
        "    return [10 * len(p) + len(r) + (r == a)\n"
        "            for p, r, a in zip(prompts, responses, answers)]\n"
    )
    prompts = [Prompt((Message("user", text),), "", "xyz") for text in ("a", "bb", "cccc")]
    assert RewardFunction(path)(prompts, ["xyz", "x", "xy"]) == [14.0, 21.0, 42.0]
    path.write_text(
        "def score(prompt, response, answer):\n"
        "    return 10 * len(prompt) + len(response) + (response == answer)\n"
    )
    assert RewardFunction(path)(prompts, ["xyz", "x", "xy"]) == [14.0, 21.0, 42.0]


def test_the_best_of_several_is_what_the_reward_likes_best(finished, tmp_path, monkeypatch):
    from run import models
    (tmp_path / "b").mkdir()
    run, source = open_run(tmp_path / "b", f"--base={finished[0]}", "--stages=eval",
                           "--eval.best_of=3")
    drawn = iter([[[5], [6, 6]], [[5, 5, 5], [6]], [[5, 5], [6, 6, 6, 6]]])
    monkeypatch.setattr(models, "answer", lambda *asked: next(drawn))

    def length(prompts, responses):
        return torch.tensor([float(len(ids)) for ids in responses])
    monkeypatch.setattr(models, "open_reward", lambda *asked: models.Reward(length, None))
    assert models.best_of(run, source.heldout()[:2]) == [[5, 5, 5], [6, 6, 6, 6]]


def test_rankings_of_a_run_are_read_as_a_file(finished, tmp_path):
    """What annotate leaves is a ranking file: --reward.data and `eval.py reward` take it."""
    import formats

    records, report = formats.read_rankings([str(finished[0] / "ranked.jsonl")])
    rows = read_jsonl(finished[0] / "ranked.jsonl")
    informative = [row for row in rows if len({text.strip() for text in row["responses"]}) > 1]
    assert len(records) == len(informative) > 10


def test_a_function_file_runs_once(finished, files, tmp_path):
    """All stages of a run share it: a file may load a model of its own."""
    log, path = tmp_path / "log", tmp_path / "counting.py"
    path.write_text(
        f"open({str(log)!r}, 'a').write('x')\n"
        "def score(prompt, response, answer):\n    return len(response)\n"
    )
    train.main([
        f"--model={finished[0] / 'sft'}", f"--out={tmp_path / 'run'}", *LENGTHS, *SMALL,
        f"--ppo.prompts={files / 'prompts.jsonl'}", f"--reward.function={path}",
        "--stages=sample,annotate,ppo,eval", "--eval.holdout=8", "--reward.sampled_prompts=4"])
    assert log.read_text() == "x"


def test_an_evaluation_needs_a_judge_and_a_model(finished, files, tmp_path):
    """Scores that nobody gave would be a tie of all models."""
    with pytest.raises(ValueError, match="nobody judges the answers"):
        train.main([
            f"--model={finished[0] / 'sft'}", f"--out={tmp_path / 'a'}", *LENGTHS,
            f"--ppo.prompts={files / 'prompts.jsonl'}", "--eval.holdout=8", "--stages=eval"])
    with pytest.raises(ValueError, match="has no model to evaluate: run --stages=sft first"):
        train.main([*golden.FLAGS, f"--out={tmp_path / 'b'}", "--stages=eval"])


# ---------------------------------------------------------------------------------------------
# Baselines and who is asked

RANKED = [
    {"prompt_ids": [1, 7], "response_ids": [[5, 2], [6, 6, 2], [8, 2]], "ranks": [3, 1, 2]},
    {"prompt_ids": [1, 8], "response_ids": [[5, 2], [6, 2], [6, 2]], "ranks": [2, 1, 1]},
    {"prompt_ids": [1, 9], "response_ids": [[4, 2], [3, 3], [5, 2]], "ranks": [2, 1.5, 1.5]},
    {"prompt_ids": [1, 5], "response_ids": [[4, 2], [6, 2], [7, 2]], "ranks": [1, 1, 1]},
    {"prompt_ids": [1, 6], "response_ids": [[9, 2], [9, 9, 2], [9, 2]], "ranks": [1, 2, 1]},
]


def test_top_imitates_the_best_of_every_ranking(finished, tmp_path, monkeypatch):
    """Of two best ones the first; a ranking without a pair has no best; none that is held out."""
    out = tmp_path / "b"
    out.mkdir()
    shutil.copy(finished[0] / "config.json", out)
    write(out / "ranked.jsonl", [{**row, "id": i, "task": "", "responses": list("abc")}
                                  for i, row in enumerate(RANKED)])
    run, source = open_run(out, f"--base={finished[0]}", "--stages=top", "--reward.holdout=0.01",
                           "--top.epochs=5", "--top.lr=0.25", "--sft.epochs=1")
    held, rest = sources.hold_out(source.rankings(), 0.01)
    assert len(held) == 1 and len(rest) == 3
    asked = []
    monkeypatch.setattr(train, "train_on", lambda *args, **shown: asked.append(args))
    train.run_top(run, source)
    [(_, name, model, examples, make_batch, loss, config)] = asked
    best = {(1, 7): [6, 6, 2], (1, 8): [6, 2], (1, 9): [3, 3], (1, 6): [9, 2]}
    expected = [(list(one.ranking.prompt), best[tuple(one.ranking.prompt)]) for one in rest]
    assert [example.tokens for example in examples] == [p + r for p, r in expected]
    masks = [[False] * len(p) + [True] * len(r) for p, r in expected]
    assert [example.response_mask for example in examples] == masks
    assert (name, loss, make_batch) == ("top", train.sft.loss, sources.sft_batch)
    assert config == dataclasses.replace(run.config.sft, epochs=5.0, lr=0.25)
    start = load_pretrained(finished[0] / "sft").state_dict()
    assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())


def test_with_rankings_from_files_top_has_work(finished, tmp_path):
    """Nothing is sampled or annotated; the responses of the file are imitated."""
    rows = [{"prompt": f"Copy: {a} {b}", "chosen": f"{a} {b}", "rejected": b}
            for a in WORDS for b in WORDS[:4]]
    path, out = write(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    config = settings.parse_args(
        [f"--model={finished[0] / 'sft'}", f"--out={out}", *LENGTHS, f"--reward.data={path}",
         "--stages=sample,annotate,top,reward", f"--ppo.prompts={path}"], train.STAGES)
    assert train.stages_to_run(train.STAGES, config, out) == ["top", "reward"]
    out.mkdir()
    run, source = open_run(out, f"--model={finished[0] / 'sft'}", *LENGTHS,
                           f"--reward.data={path}", "--stages=top")
    texts = {run.tokenizer.decode(example.tokens)
             for example in (one.ranking.best for one in source.rankings())}
    assert texts == {f"{row['prompt']}\n{row['chosen']}" for row in rows}


def test_a_prompt_given_twice_for_the_evaluation_is_held_out_once(finished, tmp_path, capsys):
    texts = ["Copy: fox dog", "Copy: owl", "Copy:  fox dog", "Copy: owl", "Copy: hen"]
    rows = [{"prompt": text, "response": str(n)} for n, text in enumerate(texts)]
    chosen = write(tmp_path / "eval.jsonl", rows)
    (tmp_path / "run").mkdir()
    _, source = open_run(tmp_path / "run", f"--model={finished[0] / 'sft'}", *LENGTHS,
                         "--stages=eval", f"--eval.prompts={chosen}")
    source.choose_heldout()
    held = read_jsonl(tmp_path / "run" / "heldout.jsonl")
    assert [(row["prompt"], row["answer"]) for row in held] == [
        ("Copy: fox dog", "0"), ("Copy: owl", "1"), ("Copy: hen", "4")]
    assert "2 repeated prompts left out" in capsys.readouterr().out


def test_with_a_pretrained_model_top_runs_when_named(finished):
    pretrained = [f"--model={finished[0] / 'sft'}", *LENGTHS, "--sft.data=x", "--ppo.prompts=x"]
    for flags, expected in ((pretrained, False), ([], True)):
        values = settings.parse_args([*flags, "--plan"], train.STAGES)
        assert ("top" in values.stages) == expected and len(values.stages) == 6 + expected
    named = settings.parse_args([*pretrained, "--plan", "--stages=top"], train.STAGES)
    assert named.stages == ("top",)


def test_who_judges_looks_on(finished, tmp_path, monkeypatch):
    """judge_mean is the mean of the rubric over all episodes, read anew; nothing where it pays."""
    rollouts = []
    roll_out = train.roll_out

    def look(*args):
        rollouts.append(roll_out(*args))
        return rollouts[-1]

    monkeypatch.setattr(train, "roll_out", look)
    flags = [f"--base={finished[0]}", "--stages=ppo", "--ppo.iterations=2"]
    train.main([*flags, f"--out={tmp_path / 'a'}", "--ppo.in_domain_share=0.5"])
    run, source = open_run(tmp_path / "a", "--stages=ppo")
    asked = {prompt.ids: prompt for prompt in source.prompts_to_train()}
    rows = read_jsonl(tmp_path / "a" / "metrics.jsonl")
    for row, rollout in zip(rows, rollouts, strict=True):
        scores = []
        for tokens, real, mask in zip(rollout.tokens, rollout.attention_mask, rollout.response_mask):
            prompt = asked[tuple(tokens[real & ~mask].tolist())]
            text = data.decode_response(run.tokenizer, tokens[mask].tolist(), "plain",
                                        prompt.messages)
            scores.append(sources.microcosm.rubric.score(prompt.text, text, prompt.answer))
        assert len(set(scores)) > 1
        assert row["judge_mean"] == pytest.approx(sum(scores) / len(scores))
    train.main([*flags, f"--out={tmp_path / 'b'}", "--ppo.reward=function"])
    assert all("judge_mean" not in row for row in read_jsonl(tmp_path / "b" / "metrics.jsonl"))


def test_some_models_can_be_asked(finished, tmp_path, capsys):
    """In the table's order; without the reference there are columns and no changes."""
    whole = json.loads((finished[0] / "eval.json").read_text())
    for names, asked in (("ppo,sft", ["sft", "ppo"]), ("ppo", ["ppo"])):
        out = tmp_path / names
        train.main([f"--base={finished[0]}", f"--out={out}", "--stages=eval",
                    f"--eval.models={names}"])
        results = json.loads((out / "eval.json").read_text())
        assert results["models"] == {name: whole["models"][name] for name in asked}
        assert list(results["sampled"]["models"]) == asked
        assert list(results["changes"]) == asked[1:] == list(results["sampled"]["changes"])
        assert {row["model"] for row in read_jsonl(out / "answers.jsonl")} == set(asked)
    assert capsys.readouterr().out.count("no model sft to compare with") == 1
    assert "change" not in (out / "report.md").read_text()
    with pytest.raises(ValueError, match="no model to evaluate of pop: it has sft, top, best-of-5"):
        train.main([f"--base={finished[0]}", f"--out={tmp_path / 'c'}", "--stages=eval",
                    "--eval.models=pop"])
