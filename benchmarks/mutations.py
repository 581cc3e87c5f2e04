"""mutations.py - do the tests notice mistakes? Makes one at a time and runs the tests that could see it.

    python benchmarks/mutations.py [--only WORD] [--jobs 2]

mistakes.txt lists them: a file, a text that occurs in it exactly once, its replacement, why it matters. Each
runs in a copy of the tree; it is caught if a test fails. Survivors are printed, exit code 1 if there are any
but those in EQUIVALENT. A text that no longer occurs once is an error: the list stays green with the code.
"""
import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

TOP = Path(__file__).resolve().parent.parent
TESTS = {
    "data.py": "tokens eval tiny_world table train sae bad_inputs kills distributed",
    "sae.py": "sae walk bad_inputs",
    "model_gemma.py": "gemma parity bad_inputs distributed", "lora.py": "lora walk train bad_inputs",
    "sails.py": "subspace contrast theory walk", "eval.py": "eval judges table",
    "train.py": "objectives table train distributed", "benchmarks/tiny_world.py": "tiny_world studies",
    "benchmarks/study.py": "studies", "benchmarks/tiny_study.py": "studies", "benchmarks/pages.py": "report",
    "benchmarks/gcg.py": "attack",
    "benchmarks/explain.py": "explain", "benchmarks/asking.py": "judges"}

MISTAKES = ast.literal_eval(Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8"))
EQUIVALENT = {}  # old text: why no test can see it

def fails(folder, tests):
    """True if one of these tests, slow or not, fails in a copy of the tree."""
    files = [f"tests/test_{t}.py" for t in tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files, "-m"]
    return any(subprocess.run([*command, some], cwd=folder, capture_output=True).returncode in (1, 2)
               for some in ("not slow", "slow"))

def attempt(name, mistake, folders):
    """True if a test fails on the mistake; one copy of the tree is taken from `folders` and given back."""
    old, new, _ = mistake
    text, folder = (TOP / name).read_text(encoding="utf-8"), folders.get()
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    caught = fails(folder, TESTS[name].split())
    (folder / name).write_text(text, encoding="utf-8")
    folders.put(folder)
    return caught

def main():
    ap = argparse.ArgumentParser(description="Make mistakes one at a time; print those that no test notices.")
    ap.add_argument("--only", default="", help="mistakes whose file or reason holds this word")
    ap.add_argument("--jobs", type=int, default=2)
    args = ap.parse_args()
    todo = [(name, m) for name, some in MISTAKES.items() for m in some if args.only in name + m[2]]
    stale = [(name, m[0]) for name, m in todo if (TOP / name).read_text(encoding="utf-8").count(m[0]) != 1]
    if stale:
        sys.exit("\n".join(f"not exactly once in {name}: {old!r}" for name, old in stale))
    with tempfile.TemporaryDirectory() as tmp:
        folders = SimpleQueue()
        for i in range(args.jobs):
            ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
            folders.put(Path(shutil.copytree(TOP, f"{tmp}/{i}", ignore=ignore)))
        if fails(Path(tmp) / "0", sorted({t for name, _ in todo for t in TESTS[name].split()})):
            sys.exit("a test fails without any mistake: each would count as caught")
        with ThreadPoolExecutor(args.jobs) as pool:
            found = pool.map(lambda job: attempt(*job, folders), todo)
            missed = []
            for (name, m), caught in zip(todo, found):
                print(f"{'caught  ' if caught else 'SURVIVED'} {name:26s} {m[2]}", flush=True)
                missed += [] if caught else [m[0]]
    print(f"{len(todo)} mistakes, {len(missed)} survivors; equivalent: {len(set(missed) & set(EQUIVALENT))}")
    return 1 if set(missed) - set(EQUIVALENT) else 0

if __name__ == "__main__":
    sys.exit(main())
