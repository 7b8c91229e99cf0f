"""Runs are killed at random moments and inside every kind of write, or stopped, continued, and compared with an undisturbed one.

    python tests/kill.py --kills=200 [--ranks=2] [--seed=0]      prints what failed and what differs; test_kill.py is the short one
    python tests/kill.py --stops [--ranks=2]                     SIGTERM and SIGINT in every stage

A process kills itself at the n-th event of a kind, or is killed after a while:

    half     a file is half on the disk          rename   the new file, or folder, has not got its name yet
    torn     half a line of a log is written     removal  of what has served, one file is gone
    time     at any moment                       stop     SIGTERM at a line of a log or an answer: it saves, and ends with status 0

"stop ppo 2" is the signal 2 in the stage ppo.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Callable, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train
from formats import files
from run import annotation, comparison, folder, stopping

FLAGS = ["--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_dim=32", "--sft.examples=64",
         "--sft.batch_size=16", "--sft.epochs=2", "--data.max_response_tokens=6", "--reward.sampled_prompts=24", "--reward.batch_size=8",
         "--reward.epochs=1", "--ppo.iterations=4", "--ppo.batch_size=8", "--ppo.minibatch_size=4", "--ppo.epochs=1", "--eval.in_domain=6",
         "--eval.general=12", "--reward.holdout=0.3", "--checkpoint_every=2", "--reward.generation_batch=4", "--eval.best_of=2"]
KINDS = ("half", "rename", "torn", "removal", "time", "stop")
STOPPED = ("sft", "sample", "top", "reward", "ppo", "eval")  # stages in which a run can stop
MARK = b"\nkilled itself\n"
LONGEST = {1: 4.0, 2: 14.0}  # seconds until a kill of kind "time", by ranks

torch.nn.Embedding(1, 1, device="meta")  # has torch import the rest of itself, here and not in every fork


class Killer:
    """Counts the events of one kind in this process, and kills it in the last of so many."""

    def __init__(self, kind: str, left: int) -> None:
        self.kind, self.stage, self.signal = (kind.split() + ["", signal.SIGTERM])[:3]
        self.left = left
        self.fsync, self.replace, self.rmtree = os.fsync, os.replace, shutil.rmtree
        self.append, self.ask = files.append_line, comparison.ask
        os.fsync, os.replace, shutil.rmtree = self.half, self.rename, self.removal
        folder.append_line = annotation.append_line = self.torn
        comparison.ask = self.asked
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells have programs in the background ignore

    def now(self, kind: str) -> bool:
        self.left -= kind == self.kind
        return kind == self.kind and self.left == 0

    def die(self) -> None:
        os.write(2, MARK)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def half(self, file: int) -> None:
        if self.now("half"):
            path = os.readlink(f"/proc/self/fd/{file}")
            if os.path.isfile(path) and Path(path).name not in files.LOGS:  # of which every line was written before
                os.truncate(path, os.path.getsize(path) // 2)
            self.die()
        self.fsync(file)

    def rename(self, *args) -> None:
        if self.now("rename"):
            self.die()
        self.replace(*args)

    def removal(self, path: Path, **options) -> None:
        if Path(path).is_dir() and self.now("removal"):
            for file in sorted(Path(path).rglob("*"))[:1]:
                file.is_file() and file.unlink()
            self.die()
        self.rmtree(path, **options)

    def torn(self, path: Path, row: dict) -> None:
        self.stop(row.get("stage", "sample"))
        if self.now("torn"):
            line = files.json_line(row)
            with open(path, "ab", buffering=0) as file:
                file.write(line[:len(line) // 2])
            self.die()
        self.append(path, row)

    def asked(self, *args) -> dict:
        self.stop("eval")
        return self.ask(*args)

    def stop(self, stage: str) -> None:
        if self.stage in ("", stage) and self.now("stop"):
            os.kill(os.getpid(), int(self.signal))
            while not stopping.received:
                time.sleep(0.001)


def forked(kind: str, n: int, flags: list[str], log: Path, ranks: int = 1) -> int:
    """Run train.py in forks of this process, which has imported everything; return the first status that is not 0.

    Of several the first kills itself.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            be_rank(kind if rank == 0 else "none", n, flags, log)
    if kind == "time":
        time.sleep(n / 1000)
        os.kill(children[0], signal.SIGKILL)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next(filter(None, statuses), 0)


def be_rank(kind: str, n: int, flags: list[str], log: Path) -> NoReturn:
    """Be a fork that runs train.py."""
    status = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w")  # those of pytest are other files
        Killer(kind, n)
        train.main(flags)
        status = 0
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def launched(kind: str, n: int, flags: list[str], log: Path, victim: int) -> int:
    """Run two ranks under torchrun, of which one kills itself, or torchrun is killed; return the status, -9 if killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, "worker", kind, str(n), str(victim)]
    with open(log, "a") as file:
        file.flush()
        before = log.stat().st_size
        run = subprocess.Popen([*command, *flags], stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if kind == "time":
            try:
                return run.wait(n / 1000)
            except subprocess.TimeoutExpired:
                run.kill()
        status = run.wait(240)
    is_killed = status and (kind == "time" or MARK in log.read_bytes()[before:])
    time.sleep(0.2)  # until the workers are gone, which the system ends
    return -signal.SIGKILL if is_killed else status


def worker(kind: str, n: str, victim: str, *flags: str) -> None:
    """Be a rank."""
    torch.set_num_threads(1)
    if os.environ["RANK"] == victim:
        Killer(kind, int(n))
    try:
        train.main(list(flags))
    except (ValueError, OSError) as error:
        train.parallel.fail(f"train.py: error: {error}")


def bytes_of(out: Path) -> dict[str, object]:
    """Return the files of a run, but for what speaks of time, place and --resume."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and path.suffix != ".png" and name not in ("config.json", "seconds.json", "report.md"):
            found[name] = path.read_bytes()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    found["checksums.json"] = json.loads(found["checksums.json"]).keys()
    found["metrics.jsonl"] = [{key: value for key, value in row.items() if "second" not in key} for row in rows]
    found["eval.json"] = {key: value for key, value in json.loads(found["eval.json"]).items() if key != "seconds"}
    return found


def differences(out: Path, expected: dict[str, object]) -> list[str]:
    found = bytes_of(out)
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if found.get(name) != expected.get(name) and not name.endswith(".partial")]


def stop_runs(start: Callable[..., int], first: int, work: Path) -> list[str]:
    """Stop a run in every stage, by SIGTERM and SIGINT in turn, beginning with the first; return what went wrong."""
    log, out = work / "log", work / f"run{first}"
    if not (work / "whole").exists() and start("none", 0, [*FLAGS, f"--out={work / 'whole'}"], log):
        raise ValueError(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    wrong = []
    for n, stage in enumerate(STOPPED):
        number = (signal.SIGTERM, signal.SIGINT)[(n + first) % 2]
        log.write_text("")
        status = start(f"stop {stage} {number}", 1, [*FLAGS, f"--out={out}", *["--resume"] * (n > 0)], log)
        said = [line for line in log.read_text().splitlines() if line.startswith("stopped, as asked, ")]
        is_told = len(said) == 1 and f" stage {stage}" in said[0] and said[0].endswith(f" train.py --out={out} --resume")
        if status or not is_told or "Traceback" in log.read_text() or (out / "lock").exists() or (out / "eval.json").exists():
            wrong.append(f"signal {number} in stage {stage}: status {status}: {log.read_text()[-1500:]}")
    status = start("none", 0, [*FLAGS, f"--out={out}", "--resume"], log)
    return wrong + ([f"status {status}"] if status else differences(out, bytes_of(work / "whole")))


def kill_runs(kills: int, ranks: int, seed: int, work: Path, kinds: tuple[str, ...] = KINDS, say: Callable = print) -> tuple[Counter, list[str]]:
    """Kill so often; return the kills by kind, and what went wrong."""
    rng = random.Random(seed)
    log = work / "log"
    start = (lambda *args: forked(*args)) if ranks == 1 else (lambda kind, *args: launched(kind, *args, 0 if kind == "stop" else rng.randrange(2)))
    if start("none", 0, [*FLAGS, f"--out={work / 'whole'}"], log):
        raise ValueError(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    expected, done, wrong, finished = bytes_of(work / "whole"), Counter(), [], 0
    while sum(done.values()) < kills or (work / "run").exists():
        out = work / "run"
        kind = rng.choice(kinds) if sum(done.values()) < kills else "none"
        n = rng.randint(300, int(1000 * LONGEST[ranks])) if kind == "time" else rng.randint(1, {"removal": 3}.get(kind, 12))
        flags = [*FLAGS, f"--out={out}", *["--resume"] * (out / "config.json").exists()]
        log.write_text("")
        status = start(kind, n, flags, log)
        # an evaluation that was killed while its report was written is done again, and can be stopped then
        is_stopped = kind == "stop" and not status and "stopped, as asked" in log.read_text()
        if is_stopped or status == -signal.SIGKILL:
            done[kind] += 1
            continue
        finished += 1
        bad = [f"status {status}"] if status else differences(out, expected)
        if bad:
            wrong.append(f"after {sum(done.values())} kills, the last by {kind} {n}: {', '.join(bad)}")
            say(wrong[-1], log.read_text()[-1500:] if status else "", sep="\n")
            shutil.copytree(out, work / f"wrong{finished}")
        shutil.rmtree(out)
        say(f"{sum(done.values())} kills, {finished} finished runs, {len(wrong)} wrong", flush=True)
    return done, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stops", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="kill"))
    if options.stops:
        start = forked if options.ranks == 1 else partial(launched, victim=0)
        wrong = stop_runs(start, 0, work) + stop_runs(start, 1, work)
        print(f"{2 * len(STOPPED)} stops of runs by {options.ranks} process(es):", *wrong or ["nothing failed or differs"], sep="\n")
    else:
        done, wrong = kill_runs(options.kills, options.ranks, options.seed, work)
        print(f"{sum(done.values())} kills ({', '.join(f'{kind} {count}' for kind, count in done.items())}) of runs by {options.ranks} "
              f"process(es): {len(wrong)} finished runs failed or differ" + f"; see {work}" * bool(wrong))
    if wrong:
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
