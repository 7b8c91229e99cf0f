"""A later call on the folder of a run: what it may do, and which settings it may change.

    --out=RUN --stages=...            takes further stages, whose own settings may be new
    --out=RUN --resume                goes on where the run stopped, as it was begun
    --out=RUN --resume_with_changes   likewise; settings of what is not finished yet may be others

A result in the folder stays what config.json says it is: no setting it was made with is changed.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Mapping

from formats.files import read_log

# Settings are flat here, by flag; config.json keeps them so.
Flat = Mapping[str, Any]

# Flags that speak of one call of the command: a later call does not take them from this one's run.
PER_CALL = ("out", "stages", "resume", "resume_with_changes", "plan", "ranks", "gpu_memory")

# What changes no result but for its rounding: how much is computed at once and where, how often is
# saved, how much is shown. Flags, sections, or a name for its flags in all sections.
HARMLESS = {"checkpoint_every", "checkpoint_minutes", "checkpoint_keep", "parallel",
            "microbatch_size", "microbatch_tokens", "generation_batch", "eval.show"}

# What results are made with: all of them, and those that are not made with the section of their
# name alone.
ALWAYS = {"model", "seed", "base", "data.template", "data.max_prompt_tokens",
          "data.max_response_tokens"}
MADE_WITH = {
    "heldout.jsonl": {"seed", "base", "eval.in_domain", "eval.general", "eval.holdout"},
    "to_rank.jsonl": {"ppo.prompts", "reward.sampled_prompts", "reward.in_domain_share",
                      "reward.temperatures", "reward.top_p", *ALWAYS},
    "ranked.jsonl": {"reward.function", "reward.noise", *ALWAYS},
    "top": {"sft", "top", "reward.data", "reward.holdout", *ALWAYS},
    "eval.json": set(),  # the evaluation may be repeated: nothing else is made with it
}
# Files that the later stages of a run may need, where those before did without.
NAMED_LATER = {"reward.function", "ppo.prompts"}


def is_among(flag: str, names: set[str]) -> bool:
    """Whether a flag, its section, or its name in any section is among some."""
    section, _, name = flag.rpartition(".")
    return bool({flag, section, name} & names)


def needed(stages: Mapping[str, Any], config: Any) -> list[str]:
    """Return the stages asked for, less those without work."""
    # with rankings from files there is nothing to sample and nobody to ask
    idle = ("sample", "annotate") if config.reward.data else ()
    return [stage for stage in config.stages if stage not in idle]


def stages_to_run(stages: Mapping[str, Any], config: Any, out: Path) -> list[str]:
    """Return the stages asked for whose result is not there. stages: all, with their .result."""
    return [stage for stage in needed(stages, config)
            if stage == "eval" or not (out / stages[stage].result).exists()]


def was_begun(out: Path, stage: str) -> bool:
    """Return whether a run was in a stage, and left something of it."""
    names = {stage, f"{stage}_sft"}
    if any((out / "checkpoints" / name).exists() for name in names):
        return True
    return any(row.get("stage") in names for row in read_log(out / "metrics.jsonl"))


def problems(stages: Mapping[str, Any], config: Any, old: Flat | None, new: Flat) -> Iterator[str]:
    """Yield what a call may not do in the folder of a run.

    stages: the recipe's, with their .result.   old: of the run, None if it has no config.json.
    """
    out = Path(config.out)
    results = [stage.result for stage in stages.values()] + ["heldout.jsonl"]
    present = [result for result in results if (out / result).exists()]
    done = [stage for stage in needed(stages, config) if stages[stage].result in present]
    if old is None and config.resume:
        yield (f"--resume: {out} is no run to continue, it has no config.json: name its folder "
               "with --out, or start one without --resume")
    elif old is None and present:
        yield (f"{out} has {', '.join(present)} and no config.json, so nobody knows the settings "
               "they were made with: put it back, or name a fresh --out")
    elif done and done != ["eval"] and not config.resume:
        yield (f"{out / stages[done[0]].result} exists: name a fresh --out, or continue with "
               "--resume")
    elif not config.resume:
        begun = [stage for stage in needed(stages, config)
                 if stage not in (*done, "eval") and was_begun(out, stage)]
        if begun:
            yield (f"{out}: stage {begun[0]} was begun and not finished: continue with --resume, "
                   "or name a fresh --out")
    if old is not None:
        yield from refused_changes(config, out, present, changes(old, new))


def changes(old: Flat, new: Flat) -> dict[str, list[Any]]:
    """Return old and new value of the settings that differ, by flag."""
    return {flag: [old[flag], value] for flag, value in new.items()
            if flag in old and flag not in PER_CALL and value != old[flag]}


def refused_changes(config: Any, out: Path, present: list[str],
                    changed: Mapping[str, list[Any]]) -> Iterator[str]:
    """Yield what a call may not change. present: the results that are there."""
    for flag, (old, new) in changed.items():
        made = [result for result in present
                if is_among(flag, MADE_WITH.get(result, {result, *ALWAYS}))]
        told = f"--{flag}={shown(new)}: the run in {out} has {shown(old) or 'none'}"
        if is_among(flag, HARMLESS):
            continue
        if made and (old or flag not in NAMED_LATER):
            yield (f"{told}, and {made[0]} is made with it: leave the flag out, or build on this "
                   f"run in another folder, --base={out} --out=NEW")
        elif config.resume and not config.resume_with_changes:
            yield (f"{told}: leave the flag out to go on as it was begun, or change it from here "
                   "on with --resume_with_changes")


def shown(value: Any) -> str:
    """Write a value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
