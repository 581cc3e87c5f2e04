"""torchrun's ranks: what 2 or 3 of them make is what one process makes; when one dies, all end."""
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    import torch._dynamo  # an optimizer's and FSDP's imports, which take seconds: once for all ranks
    import torch.distributed.fsdp
import data
import model_gemma
import train
from benchmarks import plan
from conftest import FIT, by_two, command, free_port, log, parity, start, trained

def rank_main(rank, n, port, out, fault, args):
    """One rank, with a fault: {"dies" | "stops" | "other base": at which rank or step}."""
    where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                 TORCHELASTIC_USE_AGENT_STORE=True, TORCHELASTIC_RESTART_COUNT=0)
    os.environ.update({k: str(x) for k, x in where.items()})
    for stream in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    load, backward = model_gemma.read_tensors, train.backward

    def hurt(model, batch, s, loss, step, stop):
        if step == fault.get("dies") and rank == n - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == fault.get("stops"):
            raise KeyboardInterrupt(signal.SIGTERM)
        return backward(model, batch, s, loss, step, stop)
    if rank == fault.get("other base"):
        model_gemma.read_tensors = lambda path: ((name, t + .01) for name, t in load(path))
    train.backward, sys.argv = hurt, ["train.py", *args]
    data.run_main(train.main)

def often(tok, template):
    """Stop ids that end replies at different lengths, so that ranks end at different times."""
    return set(range(0, tok.get_vocab_size(), 5))

def serve():
    """Fork ranks for each line of stdin, [n, port, file for what they say, fault, arguments]; exit codes."""
    train.judge_reward, data.stop_ids = parity, often
    plan.walked = lambda *_: [0, 0]                    # what memory is needed is test_plan.py's
    torch.set_num_threads(1)
    for line in sys.stdin:
        n, port, *rest = json.loads(line)
        pids = []
        for rank in range(n):
            pids.append(os.fork())
            if not pids[-1]:
                rank_main(rank, n, port, *rest)
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True)  # as torchrun keeps one
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
        del store

@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """fork(n, arguments, **fault) -> (exit codes, what the ranks said)."""
    env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    server = subprocess.Popen([sys.executable, __file__], env=env, stdin=-1, stdout=-1, text=True)

    def ranks(n, args, **fault):
        said = tmp_path_factory.mktemp("said") / "said"
        print(json.dumps([n, free_port(), str(said), fault, args]), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline()), said.read_text()
    yield ranks
    server.communicate()

@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
    """alone(more) -> the folder that one process makes of these options, once."""
    Path(home.model, "neutral.txt").write_text("\n\n".join(f"hey how use thing{i} ?" for i in range(30)))

    @functools.cache
    def run(more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "stop_ids", often)
            return trained(home, tmp_path_factory.mktemp("alone") / "run", more.replace("--shard", "")).out
    return run

def assert_alike(one, many):
    """Two runs' folders hold the same: tensors and numbers to float tolerance, replies to the letter."""
    names = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names(one) == names(many)
    for name in [n for n in names(one) if n.endswith(".safetensors")]:
        a, b = load_file(one / name), load_file(many / name)
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=3e-6) for k in a), name
    for name in [n for n in names(one) if n.endswith(("responses.jsonl", "verdicts.jsonl", "params.npz"))]:
        assert (one / name).read_bytes() == (many / name).read_bytes(), name
    for x, y in zip(log(one), log(many), strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    nll = lambda folder: data.read_json(folder / "results.json")["validation"]["NLL"]
    assert nll(one) == pytest.approx(nll(many), abs=1e-5)

LR = "--lr 1e-3 "
QUICK = (LR + "--steps 2 --batch 7 --test {test}", LR + "--steps 2 --batch 12 --method full")
SLOW = (LR + "--objective dpo --batch 7 --watch 2", LR + "--objective rloo --samples 2 --batch 7", LR + FIT,
    LR + "--shard --batch 12 --checkpointing --norm-aware --test {test}",
    LR + "--method full --objective dpo --batch 12 --checkpointing --test {test}",
    LR + "--method full --objective rloo --samples 2 --batch 12 --replay .1 --text {text}")

CASES = [pytest.param(n, more, marks=[] if (more in QUICK and n == 2) else pytest.mark.slow)
         for more in (*QUICK, *SLOW) for n in (2, 3)]

@pytest.mark.parametrize("n, more", CASES)
def test_ranks_make_what_one_process_makes(home, fork, alone, tmp_path, n, more):
    more = more.format(test=home.test, text=Path(home.model, "neutral.txt"))
    alone(more)                                        # while the server of forks is starting
    codes, said = fork(n, command(home, tmp_path / "run", more))
    assert codes == [0] * n and said.count("\ntraining ") == 1, said
    assert_alike(alone(more), tmp_path / "run")

@pytest.mark.slow
@pytest.mark.parametrize("more", (LR + "--batch 8 --save-every 1 --test {test}",
                                  LR + "--batch 12 --save-every 1 --method full --objective dpo"))
def test_a_stopped_run_resumes_on_any_number_of_processes(home, fork, alone, tmp_path, more):
    args = command(home, tmp_path / "run", more.format(test=home.test))
    codes, said = fork(2, args, stops=2)
    assert codes == [143, 143] and said.count("stopped; the same command") == 1, said
    assert fork(3, [*args, "--resume"], stops=3)[0] == [143] * 3
    assert fork(1, [*args, "--resume"])[0] == [0]
    assert_alike(alone(more.format(test=home.test)), tmp_path / "run")

@pytest.mark.slow
@pytest.mark.parametrize("more, fault, says", (
    *((more, {"dies": 1}, data.GONE) for more in ("--method lora", "--method full", "--shard")),
    ("--method lora", {"other base": 1}, "not every process holds the same weights"),
    ("--method lora --batch 2", {}, "--batch 2: 3 processes need an example each"),
    ("--method full --batch 8", {}, "3 processes need an example each, as many each if one is sharded"),
    ("--method lora --data /none.jsonl", {}, "no such file")))
def test_what_ends_one_rank_ends_all_with_one_line_within_a_minute(home, fork, tmp_path, more, fault, says):
    began = time.monotonic()
    codes, said = fork(3, command(home, tmp_path / "run", f"--batch 6 {more}"), **fault)
    errors = [line for line in said.splitlines() if line.startswith(("error", "Traceback"))]
    assert time.monotonic() - began < 60 and len(errors) == 1 and says in errors[0], said
    assert codes == [2, 2, -signal.SIGKILL if "dies" in fault else 2]
    assert "dies" in fault or not (tmp_path / "run").exists()

@pytest.mark.slow
def test_torchrun_is_gone_within_a_minute_after_one_of_its_processes_is_killed(home, tmp_path):
    args = command(home, tmp_path / "run", "--method lora --steps 100000 --save-every 5")
    process = start(args, tmp_path, *by_two())
    while not (tmp_path / "run" / "state.safetensors").exists() and process.poll() is None:
        time.sleep(.05)
    [*_, worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    ours = [line for line in said.splitlines() if "the same command" in line]
    assert process.returncode and len(ours) == 1, said

if __name__ == "__main__":
    serve()
