"""Deliberate bugs, one line each, most of them seen in real PPO code: does a test notice?

    python tests/mutants.py             every mutant; writes tests/MUTANTS.md
    python tests/mutants.py 3 17        only these

Every mutant is applied to a copy of the project, and the tests run until the first failure. A mutant whose line is not
found exactly once is an error: the list has to follow the code.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# the fast ones first
TESTS = ["update", "ppo", "oracle", "metamorphic", "reward", "model", "learning", "data", "parallel", "train", "switches", "closed_form"]


class Mutant(NamedTuple):
    bug: str
    file: str
    old: str
    new: str
    survived: bool = False  # the tests of the time did not notice: the one named now was written, or sharpened, for it


MUTANTS = [
    # advantages
    Mutant("whitening's shift_mean inverted (torchtune)", "ppo", "whitened if shift_mean else whitened + mean", "whitened + mean if shift_mean else whitened"),
    Mutant("whitening over the rank's own episodes (TRL)", "ppo", '{"global": 1, "rank": ranks}', '{"global": ranks, "rank": ranks}'),
    Mutant("whitening counts padding", "ppo", "reduce(torch.stack((mask.sum().to(x.dtype),", "reduce(torch.stack((torch.tensor(float(mask.numel())),"),
    Mutant("whitening by the standard deviation of something else: no root", "ppo", "torch.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
    Mutant("GAE runs over padding", "ppo", "gae_lambda * next_advantage).where(response_mask[:, t], 0.0)", "gae_lambda * next_advantage)"),
    Mutant("the value after the last token is not 0", "ppo", "values = rewards.where(response_mask, 0.0), values.where(response_mask, 0.0)", "values = rewards.where(response_mask, 0.0), values"),
    Mutant("GAE forgets lambda", "ppo", "gamma * gae_lambda * next_advantage", "gamma * next_advantage"),
    Mutant("returns from whitened advantages", "ppo", "advantages=advantages, returns=returns", "advantages=advantages, returns=advantages + rollout.values"),
    # rewards
    Mutant("score one past the last token (TRL)", "ppo", "scatter_add(1, last_response_index(response_mask)[:, None]", "scatter_add(1, (last_response_index(response_mask)[:, None] + 1).clamp(max=rewards.size(1) - 1)"),
    Mutant("KL with the wrong sign", "ppo", "log_ratio = logprobs - ref_logprobs\n    match", "log_ratio = ref_logprobs - logprobs\n    match"),
    Mutant("k1 clamped at 0", "ppo", 'case "k1": return log_ratio', 'case "k1": return log_ratio.clamp(min=0)'),
    Mutant("k1 clamped to +-10 (OpenRLHF)", "ppo", 'case "k1": return log_ratio', 'case "k1": return log_ratio.clamp(-10, 10)'),
    Mutant("k2 without its half", "ppo", 'return 0.5 * log_ratio.square()', 'return log_ratio.square()'),
    Mutant("k3 of the other direction", "ppo", "return torch.expm1(-log_ratio) + log_ratio", "return torch.expm1(log_ratio) - log_ratio"),
    Mutant("the penalty for cut-off answers hits the finished ones", "ppo", "config.eos_penalty * rollout.cut_off", "config.eos_penalty * ~rollout.cut_off"),
    Mutant("cut off means: as long as allowed, even with EOS", "ppo", "response[-1] != eos_id for", "len(response) == max_new_tokens for"),
    Mutant("score clipped after the penalty", "ppo", "case \"subtract\": return scores - config.eos_penalty * rollout.cut_off", "case \"subtract\": return (scores - config.eos_penalty * rollout.cut_off).clamp(-(config.score_clip or 99), config.score_clip or 99)"),
    Mutant("adaptive controller fed the mean per token (verl, OpenRLHF)", "train", 'controller.update(stats["kl"]', 'controller.update(stats["kl_per_token"]', True),
    Mutant("adaptive controller inverted", "ppo", "self.kl_coef *= 1 + error", "self.kl_coef *= 1 - error"),
    Mutant("adaptive controller ignores the number of episodes", "ppo", "error * n_episodes / self.horizon", "error / self.horizon"),
    Mutant("KL in the loss subtracted", "ppo", "loss = loss + kl_coef * (kl", "loss = loss - kl_coef * (kl"),
    # losses
    Mutant("surrogate: max instead of min", "ppo", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)"),
    Mutant("ratio clipped from above only", "ppo", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)"),
    Mutant("advantages of padding times a ratio: 0 * NaN", "ppo", "advantages = (new_logprobs - logprobs).where(response_mask, 0.0), advantages.where(response_mask, 0.0)", "advantages = (new_logprobs - logprobs).where(response_mask, 0.0), advantages", True),
    Mutant("log-ratio of padding (NaN) reaches the loss", "ppo", "advantages = (new_logprobs - logprobs).where(response_mask, 0.0), ", "advantages = new_logprobs - logprobs, "),
    Mutant("clip fraction counts clipping without effect", "ppo", "active = clipped < unclipped", "active = clipped != unclipped"),
    Mutant("squared error of padding masked after the square", "ppo", "squared = (new_values - returns).where(response_mask, 0.0).square()", "squared = (new_values - returns).square().where(response_mask, 0.0)"),
    Mutant("approx_kl by k1", "ppo", "approx_kl = torch.expm1(log_ratio) - log_ratio", "approx_kl = -log_ratio"),
    Mutant("entropy averaged over padding too (TRL)", "ppo", '"entropy": (entropy.detach().sum(), mask.sum())', '"entropy": (entropy.detach().sum(), torch.tensor(mask.numel()))'),
    Mutant("entropy punished", "ppo", "loss = loss - config.entropy_coef", "loss = loss + config.entropy_coef"),
    Mutant("value loss: min instead of max", "ppo", "torch.maximum(squared, squared_near)", "torch.minimum(squared, squared_near)"),
    Mutant("value loss without its half (RL2)", "ppo", "loss = 0.5 * (squared", "loss = (squared"),
    Mutant("value clipped around the return", "ppo", "near = values + (new_values - values)", "near = returns + (new_values - returns)"),
    Mutant("sequence weights forgotten in the value loss", "ppo", "config.value_clip_range, batch.weights)", "config.value_clip_range)"),
    Mutant("explained variance without removing the mean", "ppo", "(x - masked_mean(x, mask)).square()", "x.square()"),
    # masks and shifts
    Mutant("response mask from ids != pad", "ppo", "response_mask[b, start:end] = True", "response_mask[b, start:end] = tokens[b, start:end] != 0"),
    Mutant("attention mask from ids != pad", "ppo", "attention_mask[b, :end] = True", "attention_mask[b, :end] = tokens[b, :end] != 0"),
    Mutant("EOS left out of the response", "ppo", "response_mask[b, start:end] = True", "response_mask[b, start:max(start + 1, end - 1)] = True"),
    Mutant("logits not shifted", "model", "where = response_mask.roll(-1, dims=1)", "where = response_mask"),
    Mutant("values of the state after the token", "model", "critic(tokens, attention_mask).roll(1, dims=1)", "critic(tokens, attention_mask)"),
    Mutant("score read in the last column, padding or not", "model", "return scalars.gather(1, last)[:, 0]", "return scalars[:, -1]"),
    Mutant("positions count padding", "model", "positions = (attention_mask.cumsum(1) - 1).flatten()[places]", "positions = places % time"),
    # temperature, precision
    Mutant("temperature ignored outside sampling", "model", "F.log_softmax(logits.float() / temperature, dim=-1)", "F.log_softmax(logits.float(), dim=-1)"),
    Mutant("reference at temperature 1", "ppo", "token_logprobs(ref, *episode, response_mask[part], config.temperature)", "token_logprobs(ref, *episode, response_mask[part])"),
    Mutant("log-softmax in bfloat16", "model", "F.log_softmax(logits.float() / temperature, dim=-1)", "F.log_softmax(logits / temperature, dim=-1)"),
    Mutant("norm in bfloat16", "llama/blocks", "F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)", "x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)"),
    # cutting up the batch
    Mutant("mean of micro-batch means", "train", "machine.world / count.clamp(min=1))", "machine.world / batch.count.clamp(min=1) / len(term.batches))"),
    Mutant("gradients as many times too large as there are micro-batches", "train", "machine.world / count.clamp(min=1))", "machine.world * len(term.batches) / count.clamp(min=1))"),
    Mutant("FSDP's mean over ranks not undone", "train", "(term.weight * machine.world / count", "(term.weight / count"),
    Mutant("gradient norm of the rank alone", "train", "norm = sums[0].sqrt()", "norm = parallel.grad_square_sum(model).sqrt()"),
    Mutant("weights of the loss's terms ignored", "train", "(term.weight * machine.world", "(machine.world"),
    Mutant("minibatch size ignored (TRL under accelerate)", "ppo", "for minibatch in order.split(config.minibatch_size)", "for minibatch in order.split(config.batch_size)"),
    Mutant("the same order in every epoch", "ppo", "manual_seed(seed * 1_000 + epoch)", "manual_seed(seed * 1_000)"),
    # optimizer
    Mutant("Adam's eps 1e-8", "parallel", "eps=1e-5", "eps=1e-8"),
    Mutant("Adam's beta2 .999", "parallel", "betas=(0.9, 0.95)", "betas=(0.9, 0.999)"),
    Mutant("small gradients are scaled up to the norm", "train", "(max_grad_norm / (norm + 1e-6)).clamp(max=1.0)", "(max_grad_norm / (norm + 1e-6))"),
    Mutant("weight decay on norms and biases", "parallel", 'if p.dim() == 1], "weight_decay": 0.0', 'if p.dim() == 1], "weight_decay": weight_decay'),
    # reward model and SFT
    Mutant("log(sigmoid + 1e-5)", "reward", "(-F.logsigmoid(margins))", "(-(margins.sigmoid() + 1e-5).log())"),
    Mutant("ties count as pairs", "reward", "ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] <= ranks[:, None, :]"),
    Mutant("the worse response preferred", "reward", "ranks[:, :, None] < ranks[:, None, :]", "ranks[:, :, None] > ranks[:, None, :]"),
    Mutant("pairs averaged over the batch, not per prompt", "reward", "return (losses / n_pairs.clamp(min=1)).sum()", "return losses.sum() / n_pairs.sum() * (n_pairs > 0).sum()"),
    Mutant("calibration left out", "train", 'config.get("score_mean", 0.0), config.get("score_std", 1.0)', "0.0, 1.0"),
    Mutant("critic starts in raw reward units", "train", "parallel.local_part(critic.score.weight).div_(scale[1])", "pass"),
    Mutant("SFT trains on prompts", "sft", "token_logprobs(model, batch.tokens, batch.attention_mask, batch.response_mask)", "token_logprobs(model, batch.tokens, batch.attention_mask)"),
    # model
    Mutant("keys rotated by the wrong sign", "llama/blocks", "torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)", "torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)"),
    Mutant("cache position off by one", "llama/blocks", "<= grid.positions[:, None]", "< grid.positions[:, None]"),
    Mutant("noise by place in the batch, not by row", "model", "choose(logits, noise[rows, n]", "choose(logits, noise[:len(rows), n]"),
    # resuming
    Mutant("kl_coef not restored", "train", 'state.get("kl_coef", config.kl_coef)', "config.kl_coef"),
    Mutant("reward moments not restored", "train", '*state.get("moments", ())', ""),
    Mutant("optimizer silently fresh", "parallel", 'if key not in state["optimizer_steps"]:', "if True:"),
    Mutant("data from the start again", "train", "config.batch_size, step, run.config.seed))", "config.batch_size, step - start, run.config.seed))"),
]


def first_failure(folder: Path) -> str:
    """Run the tests until one fails; return its name, or "" if none does."""
    for name in TESTS:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", f"tests/test_{name}.py"],
                              cwd=folder, capture_output=True, text=True)
        if done.returncode:
            found = re.search(r"^(?:FAILED|ERROR) tests/(\S+\.py(?:::\w+)?)", done.stdout, re.M)
            return found[1] if found else f"test_{name}.py"
    return ""


def apply(mutant: Mutant, folder: Path) -> None:
    source = (ROOT / f"{mutant.file}.py").read_text(encoding="utf-8")
    if source.count(mutant.old) != 1:
        raise SystemExit(f"mutants.py: {mutant.bug!r}: found {source.count(mutant.old)} times in {mutant.file}.py, not once: {mutant.old}")
    (folder / f"{mutant.file}.py").write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")


def write(rows: list[tuple[int, Mutant, str]]) -> None:
    """Write MUTANTS.md: every mutant's number, what it is, and the first test that fails."""
    head = (f"Written by `python tests/mutants.py`: {sum(bool(test) for _, _, test in rows)} of {len(rows)} deliberate bugs are caught. Those marked * survived the\n"
            "tests of the time; the test named was written, or sharpened, for them.\n\n| | bug | in | first test that fails |\n|---|---|---|---|\n")
    lines = [f"| {n}{'*' * m.survived} | {m.bug} | `{m.file}.py` | {f'`{test}`' if test else '**survived**'} |" for n, m, test in rows]
    Path(__file__).with_name("MUTANTS.md").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def main(chosen: list[int]) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        for mutant in MUTANTS:
            apply(mutant, folder)  # all can be applied, before the long work begins
            shutil.copy(ROOT / f"{mutant.file}.py", folder / f"{mutant.file}.py")
        for number in chosen or range(1, len(MUTANTS) + 1):
            mutant = MUTANTS[number - 1]
            apply(mutant, folder)
            rows.append((number, mutant, first_failure(folder)))
            shutil.copy(ROOT / f"{mutant.file}.py", folder / f"{mutant.file}.py")
            print(f"{number:3}  {mutant.bug}: {rows[-1][2] or 'SURVIVED'}", flush=True)
    caught = sum(bool(test) for _, _, test in rows)
    print(f"{caught} of {len(rows)} caught")
    if not chosen:
        write(rows)


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]])
