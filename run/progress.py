"""What a person sees of PPO while it runs: numbers, and some answers to read."""
from __future__ import annotations

from typing import Mapping, Sequence

from tqdm import tqdm

import ppo
from formats import Prompt
from run.folder import Run
from run.models import pays_by_function, ranker, to_text


def show_iteration(run: Run, step: int, prompts: Sequence[Prompt], rollout: ppo.Rollout,
                   stats: Mapping[str, float], bar: tqdm, n: int = 2) -> None:
    """Log an iteration's numbers, append its first n episodes to samples.jsonl, move the bar.

    prompts: of the rollout's episodes, all ranks' together.
    """
    if not run.machine.is_main:
        return
    texts = [to_text(run, prompt, rollout.tokens[b][rollout.response_mask[b]].tolist())
             for b, prompt in enumerate(prompts)]
    judge = ranker(run)
    if judge and not pays_by_function(run):
        # nothing is trained by it: it tells whether the answers get better while the score rises
        judged = judge(prompts, texts)
        stats = {**stats, "judge_mean": sum(judged) / len(judged)}
    seconds = stats["seconds_rollout"] + stats["seconds_update"]
    tokens = rollout.attention_mask.sum().item()
    run.log("ppo", step, **stats, tokens_per_second=tokens / seconds)
    # a curve can rise over nonsense: a person should always be able to read some answers
    for b in range(min(n, len(prompts))):
        prompt_ids = rollout.tokens[b][rollout.attention_mask[b] & ~rollout.response_mask[b]]
        run.append("samples.jsonl", {
            "stage": "ppo", "step": step, "prompt": run.tokenizer.decode(prompt_ids.tolist()),
            "response": texts[b], "score": rollout.scores[b].item(),
            "cut_off": rollout.cut_off[b].item()})
    bar.set_postfix({"score": f"{stats['score_mean']:.2f}", "kl": f"{stats['kl']:.2f}",
                     "length": f"{stats['response_length']:.1f}"}, refresh=False)
    bar.update()


def tell_of_few_steps(run: Run, name: str, examples: int, steps: int) -> None:
    """Say so where data and batch size make so few optimizer steps that nothing can be learnt."""
    if steps < 10:
        # top-ranked SFT has epochs of its own; an SFT of the reward model's own size has none
        epochs = "sft" if name == "reward_sft" else name
        batch = "reward" if name == "reward" else "sft"
        run.say(f"{name}: {examples} examples are {steps} optimizer steps, from which little is "
                f"learnt: lower --{batch}.batch_size or raise --{epochs}.epochs")
