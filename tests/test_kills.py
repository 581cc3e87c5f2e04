"""What is killed at random moments of fixed seeds goes on to the files of an undisturbed run, byte for byte.
KILLS="30 10" in the environment makes it 30 kills and 10 signals."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from conftest import TOP, by_two, command, go, log, start  # first: it makes the scripts importable

import data
import eval as evaluation
import train

pytestmark = pytest.mark.slow
KILLS, SIGNALS = map(int, os.environ.get("KILLS", "8 3").split())
ORDER = "run table replies run table replies two run".split()
STAGES = dict(  # options of train.py, none for eval.py; files after whose appearance it is disturbed
    run=("--steps 100 --save-every 7 --seed 4",
         " run.json subspace.safetensors state.safetensors results.json"),
    two=("--steps 40 --save-every 7 --objective dpo", "run.json state.safetensors log.jsonl"),
    table=("--method sails,lora --lr 1e-3,1e-2 --steps 40 --save-every 7 --jobs 2",
           " base*/results.json sails*/state.safetensors */adapter_config.json lora*/log.jsonl"),
    replies=("", " eval.json responses.jsonl responses.jsonl verdicts.jsonl"))
KEPT = """adapter_model.safetensors adapter_config.json sails.json subspace.safetensors features.json
explain.json table.md log.jsonl responses.jsonl verdicts.jsonl results.json heldout-test.jsonl""".split()

def zygote():
    """Fork a process for every line on stdin; its id, then its exit code. Importing torch takes seconds."""
    sys.modules["__main__"].__file__ = f"{TOP}/train.py"               # what workers import
    for line in sys.stdin:
        script, out, *args = json.loads(line)
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)
            for fd in (1, 2):
                os.dup2(os.open(f"{out}.{fd}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
            sys.argv = [f"{script}.py", *args]
            data.run_main(dict(train=train, eval=evaluation)[script].main)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

class Launcher:
    """Starts what is disturbed; knows what an undisturbed run leaves."""
    def __init__(self, home, top):
        self.home, self.top, self.left = home, top, {}
        asks = [dict(prompt=f"{'hey ' * (i % 4)}how make thing{i} ?", label="benign") for i in range(90)]
        data.write_rows(top / "asks.jsonl", asks)
        env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(TOP))
        self.zygote = subprocess.Popen([sys.executable, __file__], env=env, stdin=-1, stdout=-1, text=True)
        self.two = self.launch("two", top / "two")[1]  # beside the first tests: it takes long

    def arguments(self, stage, out, more=""):
        if stage != "replies":
            return command(self.home, out, f"{STAGES[stage][0]} {more}")
        quick = f"--prompts {self.top}/asks.jsonl --max-new 20 --batch-size 2 --device cpu"
        return f"--model {self.home.model} {quick} --out {out} {more}".split()

    def launch(self, stage, out, more=""):
        args = self.arguments(stage, out, more)
        if stage == "two":
            process = start(args, out.parent, *by_two())
            return process.pid, lambda: (print(process.communicate(timeout=100)), process.returncode)[1]
        script, code = "eval" if stage == "replies" else "train", lambda: int(self.zygote.stdout.readline())
        print(json.dumps([script, str(out), *args]), file=self.zygote.stdin, flush=True)
        return code(), code

    def finish(self, stage, out, more=""):
        more += " --resume" * (stage in ("run", "two") and (out / "run.json").exists())
        if stage == "two":
            return self.launch(stage, out, more)[1]()
        args = " ".join(self.arguments(stage, out, more)).replace("--jobs 2", "").split()      # one by one
        return go(args, evaluation.main if stage == "replies" else train.main)[0]

    def undisturbed(self, stage):
        if stage not in self.left:
            assert (self.two() if stage == "two" else self.finish(stage, self.top / stage)) == 0
            self.left[stage] = artifacts(self.top / stage)
        return self.left[stage]

@pytest.fixture(scope="module")
def launcher(home, tmp_path_factory):
    launcher = Launcher(home, tmp_path_factory.mktemp("undisturbed"))
    yield launcher
    launcher.undisturbed("two")
    launcher.zygote.communicate()

def artifacts(folder):
    """{path: content} of the files that must be equal; a log less its timing."""
    content = lambda p: log(p.parent) if p.name == "log.jsonl" else p.read_bytes()
    return {str(p.relative_to(folder)): content(p) for p in folder.rglob("*") if p.name in KEPT}

def alive(group, folder):
    """Processes that run, of a group or with the folder in their command line."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            state, _, of = (p / "stat").read_text().rpartition(")")[2].split()[:3]
            ours = int(of) == group or f"{folder}\0".encode() in (p / "cmdline").read_bytes()
        except OSError:                                # it has just ended
            continue
        found += [int(p.name)] * (ours and state != "Z")
    return found

def disturb(launcher, stage, out, sign, rng, more="", files=None):
    """Send a signal at a random moment after one of the files is there; the exit code."""
    name, (pid, end) = rng.choice((files or STAGES[stage][1]).split(" ")), launcher.launch(stage, out, more)
    while name and Path(f"/proc/{pid}").exists() and not any(out.glob(name)):
        time.sleep(.002)
    time.sleep(rng.random() * .4)
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, sign)
    code, late = end(), time.monotonic() + 5  # a worker may be importing torch
    while (left := alive(pid, out)) and time.monotonic() < late:
        time.sleep(.02)
    for p in left:
        os.kill(p, signal.SIGKILL)
    assert not left, "processes outlive their parent"
    return code

@pytest.mark.parametrize("n", range(KILLS))
def test_what_is_killed_goes_on_to_the_same_files(launcher, tmp_path, n):
    stage, rng, out = ORDER[n % 8], random.Random(n), tmp_path / "hurt"
    while disturb(launcher, stage, out, signal.SIGKILL, rng) != -signal.SIGKILL:       # it had ended already
        shutil.rmtree(out)
    assert launcher.finish(stage, out) == 0
    assert artifacts(out) == launcher.undisturbed(stage)

@pytest.mark.parametrize("n", range(SIGNALS))
def test_a_signal_saves_says_how_to_go_on_and_loses_nothing(launcher, tmp_path, n):
    sign = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[n % 3]
    stage = "run run run table replies run".split()[n % 6]
    out, more = tmp_path / "hurt", "--save-every 1000" if stage == "run" else ""
    files = dict(run="log.jsonl", table="sails*/state.safetensors", replies="responses.jsonl")[stage]
    code = disturb(launcher, stage, out, sign, random.Random(n), more, files)
    said = Path(f"{out}.2").read_text()
    assert code == 128 + sign and len(said.split("\n")) <= 3 and len(said.strip().split("\n")) == 1, said
    if stage == "run":
        with safe_open(out / "state.safetensors", "pt") as f:
            assert f.metadata()["step"] == str(len(data.read_rows(out / "log.jsonl"))) and "--resume" in said
    assert launcher.finish(stage, out, more) == 0
    assert artifacts(out) == launcher.undisturbed(stage)

def test_a_signal_while_many_runs_wait_is_answered_by_one_line():
    code = "lambda: [print(flush=True) for _ in train.each(2, time.sleep, [.3] * 20)]"
    argv = [sys.executable, "-c", f"import time, data, train\ndata.run_main({code})"]
    many = subprocess.Popen(argv, cwd=TOP, stdout=-1, stderr=-1)
    many.stdout.readline()
    many.send_signal(signal.SIGINT)
    assert many.communicate(timeout=60)[1].count(b"\n") == 1

def test_a_worker_ends_with_its_killed_parent():
    code = "if not os.fork(): data.follow_parent(); print(os.getpid(), flush=True)\ntime.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", f"import os, time, data\n{code}"], cwd=TOP, stdout=-1)
    stat = Path(f"/proc/{int(parent.stdout.readline())}/stat")
    parent.kill()
    time.sleep(1)
    assert not stat.exists() or " Z " in stat.read_text()

def test_of_two_starts_at_once_one_runs_and_all_others_are_refused_while_it_does(launcher, tmp_path):
    out = tmp_path / "run"
    both = [start(launcher.arguments("run", out), tmp_path) for _ in "ab"]
    while not (out / "log.jsonl").exists() and any(p.poll() is None for p in both):
        time.sleep(.01)
    later = [go(launcher.arguments("run", out, more)) for more in ("", "--resume")]
    said = [p.communicate(timeout=100)[1] for p in both]
    assert sorted(p.returncode for p in both) == [0, 2] and "" in said, said
    refused = [(2, max(said)), *((code, err) for code, _, err in later)]
    assert [(code, err.count("\n"), err[:7]) for code, err in refused] == [(2, 1, "error: ")] * 3
    assert artifacts(out) == launcher.undisturbed("run")

def test_a_closed_stderr_or_stdout_does_not_stop_training(launcher, tmp_path):
    args = " ".join([sys.executable, f"{TOP}/train.py", *launcher.arguments("run", "run-${#end}")])
    both = f"for end in '2>&-' '2>&1 | head -1'; do eval OMP_NUM_THREADS=1 {args} $end & done; wait"
    subprocess.run(["bash", "-c", both], cwd=tmp_path, capture_output=True, timeout=100)
    left = [artifacts(tmp_path / name) for name in ("run-4", "run-14")]
    assert left == [launcher.undisturbed("run")] * 2

if __name__ == "__main__":
    zygote()
