"""Being asked to stop, in every stage; one run in a folder at a time; ranks that die, hang or are left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import golden
import kill
import parallel
import train
from run import annotation, comparison, opening, stopping

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def listens():
    """Hear SIGINT, which shells have programs ignore that they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signalled(number: int) -> None:
    """Send this process a signal, and wait until the run knows of it."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not stopping.received and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stopping.received == [number]


def hook(monkeypatch, stage: str, number: int) -> None:
    """Send a signal in the middle of a stage."""
    if stage == "sft":
        keep = train.keep

        def asked(run, name, step, *rest):
            if (name, step) == (stage, 2):
                signalled(number)
            keep(run, name, step, *rest)

        monkeypatch.setattr(train, "keep", asked)
        return
    module, name = {"sample": (annotation.reward, "sample"), "annotate": (annotation, "rank"),
                    "eval": (comparison, "ask")}[stage]
    inner, calls = getattr(module, name), []

    def asked_once(*args):
        calls.append(1)
        if len(calls) == 2:
            signalled(number)
        return inner(*args)

    monkeypatch.setattr(module, name, asked_once)


SMALL = [*kill.FLAGS, "--checkpoint_every=0"]
WHERE = {"sft": "after step 2 of 8 of stage sft", "annotate": "before stage top"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    train.main([*SMALL, f"--out={out}"])
    return out


@pytest.mark.parametrize("stage", WHERE)
def test_a_signal_ends_the_step_and_saves(undisturbed, tmp_path, monkeypatch, capsys, stage):
    """One line with the command that continues; then the run ends as one that was never stopped. Every stage: test_kill.py."""
    out, number = tmp_path / "run", signal.SIGINT if stage == "sft" else signal.SIGTERM
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    hook(monkeypatch, stage, number)
    train.main([*SMALL, f"--out={out}"])
    monkeypatch.undo()
    said = capsys.readouterr()
    (line,) = [line for line in said.out.splitlines() if line.startswith("stopped, as asked, ")]
    assert WHERE[stage] in line and line.endswith(f"; continue with: python train.py --out={out} --resume")
    assert "once more to stop at once" in said.err and not (out / "lock").exists()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    if stage == "sft":
        with pytest.raises(ValueError, match="stage sft was begun and not finished: continue with --resume"):
            train.main([*SMALL, f"--out={out}"])
    train.main([f"--out={out}", "--resume"])
    assert kill.bytes_of(out) == kill.bytes_of(undisturbed)


def test_sampling_is_not_done_twice(undisturbed, tmp_path, monkeypatch):
    """A resumed stage draws what is missing; a torn line of what was drawn is drawn again."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "to_rank.jsonl").unlink()
    flags = ["--resume", "--stages=sample"]
    hook(monkeypatch, "sample", signal.SIGTERM)
    train.main([f"--out={out}", *flags])
    monkeypatch.undo()
    file = out / "checkpoints" / "sample" / "rank00000.jsonl"
    os.truncate(file, file.stat().st_size - 5)  # of two batches the second
    sample, rows = annotation.reward.sample, []

    def look(model, ids, some, *rest):
        rows.extend(some)
        return sample(model, ids, some, *rest)

    monkeypatch.setattr(annotation.reward, "sample", look)
    train.main([f"--out={out}", *flags])
    assert rows == list(range(4, 24))
    assert (out / "to_rank.jsonl").read_bytes() == (undisturbed / "to_rank.jsonl").read_bytes()


def test_models_that_have_answered_are_not_asked_again(undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    (out / "eval.json").unlink()
    flags = ["--resume", "--stages=eval"]
    hook(monkeypatch, "eval", signal.SIGTERM)
    train.main([f"--out={out}", *flags])
    monkeypatch.undo()
    ask, asked = comparison.ask, []

    def look(run, prompts, name):
        asked.append(name)
        return ask(run, prompts, name)

    monkeypatch.setattr(comparison, "ask", look)
    train.main([f"--out={out}", *flags])
    assert asked == ["best-of-2", "ppo"]
    assert kill.bytes_of(out) == kill.bytes_of(undisturbed)


# The main thread waits in C, as in a collective: no handler of Python's runs.
WAITING = f"""
import ctypes, sys
sys.path.insert(0, {str(ROOT)!r})
from run import stopping
with stopping.listening(is_main=True):
    print("ready", flush=True)
    for _ in range(3):
        ctypes.CDLL(None).pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number):
    """Also where the main thread waits in C; signals within a second are one."""
    run = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    time.sleep(0.2)
    run.send_signal(number)
    time.sleep(1.2)
    assert run.poll() is None
    run.send_signal(number)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 128 + number and "Traceback" not in said and len(said.strip().splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# One run at a time


def test_a_second_run_is_kept_out(tmp_path):
    lock = opening.take_lock(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* is at work in it: wait for it, or end it"):
        train.main([*golden.FLAGS, f"--out={tmp_path}"])
    assert os.listdir(tmp_path) == ["lock"]
    opening.free_lock(tmp_path, lock)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"host": opening.platform.node(), "process": 1})])
def test_what_a_dead_process_left_keeps_nobody_out(tmp_path, content):
    """Not even where its number is another process's by now."""
    (tmp_path / "lock").write_text(content)
    opening.free_lock(tmp_path, opening.take_lock(tmp_path))


def test_another_machine_is_asked_about(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "process": 12}))
    with pytest.raises(ValueError, match=f"process 12 on elsewhere is at work in it: if it is not running any more, delete {tmp_path}/lock"):
        opening.take_lock(tmp_path)


# ---------------------------------------------------------------------------------------------
# Two processes under torchrun

STEPS = ["--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_dim=32", "--sft.examples=64",
         "--sft.batch_size=16", "--sft.epochs=20", "--stages=sft", "--checkpoint_every=2", "--parallel.timeout=0.1"]


class Launched:
    """torchrun with two ranks, which have left a checkpoint after two steps of 80."""

    def __init__(self, out: Path, *flags: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
        self.process = subprocess.Popen([*launcher, "train.py", f"--out={out}", *STEPS], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not (out / "checkpoints" / "sft" / "000002").exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)
        self.main = json.loads((out / "lock").read_text())["process"]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.workers = [int(child) for child in children]
        (self.other,) = set(self.workers) - {self.main}

    def ended(self) -> str:
        """Wait for the end, of the workers too; return the lines that are neither a bar's nor torchrun's own."""
        said = self.process.communicate(timeout=60)[0]
        deadline = time.monotonic() + 5
        while any(opening.state_of(worker) != "is gone" for worker in self.workers):
            assert time.monotonic() < deadline, "a worker is left alone"
            time.sleep(0.05)
        lines = said.replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if "it/s" not in line and " torch/distributed/" not in line)


@pytest.mark.parametrize("whom", ["launcher", "main rank"])
def test_torchrun_is_stopped_with_one_line(tmp_path, whom):
    """All ranks end after the same step. Of a torchrun that is signalled itself the status cannot be 0."""
    run = Launched(tmp_path / "a")
    os.kill(run.process.pid if whom == "launcher" else run.main, signal.SIGTERM)
    said = run.ended()
    assert run.process.returncode == (-signal.SIGUSR1 if whom == "launcher" else 0) and "Traceback" not in said
    steps = golden.lines(tmp_path / "a" / "metrics.jsonl")[-1]["step"]
    assert f"stopped, as asked, after step {steps} of 80 of stage sft; continue with: torchrun --nproc_per_node=2 train.py " in said
    assert (tmp_path / "a" / "checkpoints" / "sft" / f"{steps:06d}").is_dir()


@pytest.mark.parametrize("number,state", [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "is stopped")])
def test_a_rank_that_does_not_answer_is_named(tmp_path, number, state):
    run = Launched(tmp_path / "a")
    os.kill(run.other, number)
    said = run.ended()
    assert run.process.returncode != 0 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "train.py: error: " in line]
    assert "stage sft: another process does not answer" in line and f"(process {run.other} on " in line
    assert f") {state}; continue with: torchrun --nproc_per_node=2 train.py --out=" in line and "--resume" in line


def test_workers_end_with_their_launcher(tmp_path):
    run = Launched(tmp_path / "a")
    run.process.kill()
    run.ended()
    assert not (tmp_path / "a" / "sft").exists(), "they came to the end of their work first"


def test_torchrun_starts_ranks_again_where_they_were(tmp_path):
    run = Launched(tmp_path / "a", "--max-restarts=1")
    os.kill(run.other, signal.SIGKILL)
    said = run.process.communicate(timeout=120)[0]
    assert run.process.returncode == 0, said
    assert "continues after step " in said
    assert [row["step"] for row in golden.lines(tmp_path / "a" / "metrics.jsonl")] == list(range(1, 81))


@pytest.mark.parametrize("command", ["eval", "benchmarks.command"])
def test_the_evaluation_says_that_it_was_stopped(monkeypatch, capsys, command):
    """Ctrl-C: one line, status 130."""
    import eval as evaluation
    from benchmarks import command as benchmark

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "run", interrupted)
    monkeypatch.setattr(evaluation.speaking, "write_generations", interrupted)
    monkeypatch.setattr(parallel, "leave", sys.exit)
    args = ["generate", "x", "--prompts=y"] if command == "eval" else ["run", "x", "--tasks=boolq", "--data=y"]
    with pytest.raises(SystemExit) as status:
        evaluation.main(args)
    assert status.value.code == 130 and capsys.readouterr().err.strip().endswith(": stopped")
