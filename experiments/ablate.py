"""Ablations: variants x seeds, what they share run once, tables with intervals, plots.

    python experiments/ablate.py kl                 one of the paper's factors (factors.py)
    python experiments/ablate.py all                all of them
    python experiments/ablate.py "k3: --ppo.kl_kind=k3" "abs: --ppo.kl_kind=abs"
                                                    variants of your own, against the default

    --seeds=0,1,2    instead of the factor's own number of them, from 0 on
    --jobs=2         runs at a time, one core each
    --runs=DIR       where runs are kept; what is finished there is not run again
    --out=DIR        where NAME.md and its plots go
    Any other --section.name=value goes to train.py, in every variant.

Interrupted, the same command goes on where it was.
"""
from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Sequence

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it imports its neighbours

from experiments.factors import DEFAULT, FACTORS, Factor, Variant
from experiments.jobs import Job, flag_of, job_of, of_other_code, run_all
from experiments.summary import write_factor
from run.settings import parse_args
from train import STAGES

HERE = Path(__file__).parent
OWN = ("seeds", "jobs", "runs", "out")


def own_factor(texts: Sequence[str]) -> Factor:
    """Return a factor of variants given as "label: --switch=value ..."."""
    variants = {"default": DEFAULT}
    for text in texts:
        label, colon, switches = text.partition(":")
        if not colon or not switches.strip().startswith("--"):
            raise ValueError(f"{text!r} is neither one of {', '.join(FACTORS)}, all, nor a variant "
                             '"label: --switch=value ..."')
        variants[label.strip()] = Variant(switches.strip())
    return Factor("What do these changes do?", variants)


def chosen(names: Sequence[str]) -> dict[str, Factor]:
    """Return the factors that the command names."""
    if list(names) == ["all"]:
        return FACTORS
    if names and set(names) <= FACTORS.keys():
        return {name: FACTORS[name] for name in names}
    if not names:
        raise ValueError(f"name a factor ({', '.join(FACTORS)}, all) or a variant")
    return {"own": own_factor(names)}


def main(args: Sequence[str]) -> None:
    """Run what is asked for and write its results; ValueError at the end if a run failed."""
    began = time.perf_counter()
    options = {flag_of(arg): arg.partition("=")[2] for arg in args
               if arg.startswith("--") and flag_of(arg) in OWN}
    common = [arg for arg in args if arg.startswith("--") and flag_of(arg) not in OWN]
    factors = chosen([arg for arg in args if not arg.startswith("--")])
    runs = Path(options.get("runs", HERE / "runs")).absolute()
    out = Path(options.get("out", HERE / "results"))
    seeds = [int(seed) for seed in options["seeds"].split(",")] if "seeds" in options else None

    # 1. The jobs; a switch that train.py refuses shows before any of them starts.
    jobs: dict[str, dict[str, list[Job]]] = {}
    for name, factor in factors.items():
        for variant in factor.variants.values():
            parse_args([*common, *variant.switches.split()], STAGES)
        jobs[name] = {label: [job_of(variant, seed, common)
                              for seed in seeds or range(factor.seeds)]
                      for label, variant in factor.variants.items()}
    last = [job for by_label in jobs.values() for of in by_label.values() for job in of]
    failed = run_all(last, runs, int(options.get("jobs", 2)))
    if failed:
        raise ValueError(f"{len(failed)} runs failed, the same command tries again; see "
                         + ", ".join(failed))

    # 2. What came out. A change of the code, or of a default, changes no folder's name: that a run
    #    was kept from before must be told.
    old = of_other_code(last, runs)
    if old:
        print(f"{len(old)} runs in {runs} are of other code than this: for runs of this one alone "
              "give a fresh --runs=DIR")
    # a factor's own command, whichever others were asked for beside it
    rest = [arg for arg in args if arg not in FACTORS and arg != "all"]
    minutes = (time.perf_counter() - began) / 60
    for name, factor in factors.items():
        own = [name, *rest] if name in FACTORS else rest
        command = f"python experiments/ablate.py {shlex.join(own)}"
        written = write_factor(name, factor, jobs[name], runs, out, command)
        print(f"{name:12} {written}")
    print(f"{minutes:.0f} minutes")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"ablate.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
