"""Processes killed at random moments of fixed seeds go on to the artifacts of undisturbed ones, byte for byte.

`python tests/test_kills.py 30 10` does the same with 30 kills and 10 signals.
"""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import data
import eval as evaluation
import train
from conftest import TOP, command, go, start

pytestmark = pytest.mark.slow
KILLS, SIGNALS = map(int, os.environ.get("KILLS", "8 3").split())
RUN = "--steps 150 --save-every 7 --seed 4"
STAGES = {  # options of train.py, none for eval.py; files after whose appearance it is killed
    "run": (RUN, ("", "run.json", "subspace.safetensors", "state.safetensors", "adapter_model.safetensors", "responses.jsonl")),
    "table": ("--method sails,lora --lr 1e-3,1e-2 --steps 40 --save-every 7 --jobs 2", (
        "", "base*/results.json", "sails*/state.safetensors", "*/adapter_config.json", "lora*/log.jsonl")),
    "replies": (None, ("", "eval.json", "responses.jsonl", "responses.jsonl", "verdicts.jsonl")),
    "two": (RUN + " --objective dpo", ("run.json", "state.safetensors", "log.jsonl"))}
ORDER = "run table replies run table replies two run".split()
KEPT = ("adapter_model.safetensors subspace.safetensors features.json responses.jsonl verdicts.jsonl results.json table.md "
        "adapter_config.json sails.json log.jsonl heldout-test.jsonl").split()

def zygote():
    """Fork a process for every line on stdin; its id, then its exit code. Importing torch takes seconds."""
    sys.modules["__main__"].__file__ = f"{TOP}/train.py"               # what workers import
    for line in sys.stdin:
        script, out, *args = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            for fd, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{out}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.argv = [f"{script}.py", *args]
            data.run_main(dict(train=train, eval=evaluation)[script].main)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

@pytest.fixture(scope="module")
def launch(home, tmp_path_factory):
    """launch(stage, folder, more) -> (process id, a function that waits for its exit code)."""
    asks = tmp_path_factory.mktemp("asks") / "asks.jsonl"
    data.write_rows(asks, [dict(prompt=f"{'hey ' * (i % 4)}how make thing{i} ?", label="benign") for i in range(90)])
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(TOP))
    server = subprocess.Popen([sys.executable, __file__, "zygote"], env=env, stdin=-1, stdout=-1, text=True)

    def arguments(stage, out, more=""):
        if stage != "replies":
            return command(home, out, f"{STAGES[stage][0]} {more}")
        return f"--model {home.model} --prompts {asks} --max-new 20 --batch-size 2 --device cpu --out {out} {more}".split()

    def launch(stage, out, more=""):
        args = arguments(stage, out, more)
        if stage == "two":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            process = start(args, out.parent, *f"-m torch.distributed.run --nproc-per-node 2 --master-port {port}".split())
            return process.pid, lambda: (process.communicate(timeout=100), process.returncode)[1]
        print(json.dumps(["eval" if stage == "replies" else "train", str(out), *args]), file=server.stdin, flush=True)
        return int(server.stdout.readline()), lambda: int(server.stdout.readline())
    launch.arguments = arguments
    yield launch
    server.stdin.close()
    server.wait()

@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory):
    """undisturbed(stage) -> what an undisturbed run leaves; two processes are started beside the first tests."""
    top, left = tmp_path_factory.mktemp("undisturbed"), {}
    _, end = launch("two", top / "two")

    def undisturbed(stage):
        if stage not in left:
            assert end() == 0 if stage == "two" else finish(launch, stage, top / stage) == 0
            left[stage] = artifacts(top / stage)
        return left[stage]
    return undisturbed

def finish(launch, stage, out, more=""):
    """Go on in this process, or in two again; the exit code."""
    more += " --resume" * (stage in ("run", "two") and (out / "run.json").exists())
    if stage == "two":
        return launch(stage, out, more)[1]()
    args = launch.arguments(stage, out, more)
    args = args[:args.index("--jobs")] if "--jobs" in args else args   # here one run after another
    return go(args, evaluation.main if stage == "replies" else train.main)[0]

def artifacts(folder):
    """{path: content} of a folder's files that a disturbed run must leave, too; logs less their timing."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.name in KEPT}
    untimed = lambda row: {k: v for k, v in row.items() if k != "tokens_per_s"}
    return {k: [untimed(json.loads(r)) for r in v.splitlines()] if k.endswith("log.jsonl") else v for k, v in found.items()}

def alive(group, folder):
    """Processes of a group, or with the folder in their command line, that run."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (p / "stat").read_text().rpartition(")")[2].split()[:3]
            ours = int(its_group) == group or str(folder).encode() + b"\0" in (p / "cmdline").read_bytes()
        except OSError:                                # it has just ended
            continue
        found += [p.name] * (ours and state != "Z")
    return found

def disturb(launch, stage, out, sign, rng, more="", files=None):
    """Send a signal at a random moment after one of the files is there; the exit code."""
    name, (pid, end) = rng.choice(files or STAGES[stage][1]), launch(stage, out, more)
    running, wait = lambda: Path(f"/proc/{pid}").exists(), rng.random() * .4
    while name and running() and not any(out.glob(name)):
        time.sleep(.002)
    time.sleep(wait)
    if running():
        os.kill(pid, sign)
    code, gone = end(), time.monotonic() + 2
    while alive(pid, out) and time.monotonic() < gone:
        time.sleep(.02)
    left = alive(pid, out)
    for p in left:
        os.kill(int(p), signal.SIGKILL)
    assert not left, "processes outlive their parent"
    return code

@pytest.mark.parametrize("n", range(KILLS))
def test_what_is_killed_goes_on_to_the_same_files(launch, undisturbed, tmp_path, n):
    stage, rng, out = ORDER[n % 8], random.Random(n), tmp_path / "hurt"
    while disturb(launch, stage, out, signal.SIGKILL, rng) != -signal.SIGKILL:         # it had ended already
        shutil.rmtree(out)
    assert finish(launch, stage, out) == 0
    assert artifacts(out) == undisturbed(stage)

@pytest.mark.parametrize("n", range(SIGNALS))
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(launch, undisturbed, tmp_path, n):
    sign, stage = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[n % 3], (["run"] * 3 + ORDER)[n % 9]
    rng, out, more = random.Random(n), tmp_path / "hurt", "--save-every 1000" if stage == "run" else ""
    code = disturb(launch, stage, out, sign, rng, more, dict(run=["log.jsonl"], table=STAGES["table"][1][2:3]).get(stage))
    said = Path(f"{out}.err").read_text()
    assert code == 128 + sign, said
    assert len(said.split("\n")) <= 3 and len(said.strip().split("\n")) == 1 and "Traceback" not in said
    if stage == "run":
        with safe_open(out / "state.safetensors", "pt") as f:
            assert f.metadata()["step"] == str(len(data.read_rows(out / "log.jsonl"))) and "--resume" in said
    assert finish(launch, stage, out, more) == 0
    assert artifacts(out) == undisturbed(stage)

def test_a_folder_in_use_is_refused_and_the_run_in_it_is_not_disturbed(launch, undisturbed, tmp_path):
    out, args = tmp_path / "run", launch.arguments("run", tmp_path / "run")
    _, end = launch("run", out)
    while not (out / "log.jsonl").exists():
        time.sleep(.01)
    refused = [go(args + more) for more in ([], ["--resume"])]
    assert [(code, err.count("\n"), err[:7]) for code, _, err in refused] == [(2, 1, "error: ")] * 2
    assert end() == 0 and artifacts(out) == undisturbed("run")

def test_of_two_starts_at_once_one_runs_and_the_other_is_refused(launch, undisturbed, tmp_path):
    both = [start(launch.arguments("run", tmp_path / "run"), tmp_path) for _ in "ab"]
    said = [p.communicate(timeout=100)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2], said
    assert all("Traceback" not in err and err.count("\n") <= 1 for err in said)
    assert artifacts(tmp_path / "run") == undisturbed("run")

def test_a_closed_stderr_or_stdout_does_not_stop_training(launch, undisturbed, tmp_path):
    shells = {}
    for name, end in (("a", "2>&-"), ("b", "| head -1"), ("c", "2>&1 | true")):
        line = f"{sys.executable} {TOP}/train.py {' '.join(launch.arguments('run', tmp_path / name))} {end}"
        shells[name] = subprocess.Popen(["bash", "-c", line], env=os.environ | dict(OMP_NUM_THREADS="1"),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert [p.wait(100) >= 0 for p in shells.values()] == [True] * 3
    assert [name for name in shells if artifacts(tmp_path / name) != undisturbed("run")] == []

if __name__ == "__main__":
    if sys.argv[1:] == ["zygote"]:
        zygote()
    else:
        os.environ["KILLS"] = " ".join(sys.argv[1:])
        sys.exit(pytest.main([__file__, "-q", "-W", "ignore"]))
