"""The house's own limits: what keeps the seven scripts readable in an evening."""
import ast
import re
import subprocess

import pytest

from conftest import TOP

SCRIPTS = ("data", "model_gemma", "sae", "sails", "lora", "eval", "train")  # imports point to the left
SOURCE = {name: (TOP / f"{name}.py").read_text(encoding="utf-8") for name in SCRIPTS}
PYTHON = [*TOP.glob("*.py"), *TOP.glob("tests/*.py"), *TOP.glob("benchmarks/*.py")]
README = (TOP / "README.md").read_text(encoding="utf-8")
FUNCTIONS = {(name, f.name): f for name, text in SOURCE.items() for f in ast.walk(ast.parse(text))
             if isinstance(f, ast.FunctionDef)}

@pytest.mark.parametrize("path", [*PYTHON, TOP / "README.md"], ids=lambda p: p.relative_to(TOP).as_posix())
def test_no_line_is_wider_than_110_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 110] == []

def test_the_scripts_tests_and_readme_keep_their_budgets():
    count = lambda paths: sum(p.read_text(encoding="utf-8").count("\n") for p in paths)
    assert {p.stem for p in TOP.glob("*.py")} == set(SCRIPTS)
    assert count(TOP.glob("*.py")) <= 3500
    assert sum(len(text.encode()) for text in SOURCE.values()) <= 195_000
    assert SOURCE["train"].count("\n") <= 650 and SOURCE["eval"].count("\n") <= 700
    assert README.count("\n") <= 150
    assert count(TOP.glob("tests/*.py")) <= 4500 and count(TOP.glob("benchmarks/*study.py")) <= 600

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_only_scripts_that_are_read_before_it(name):
    nodes = [n for n in ast.walk(ast.parse(SOURCE[name])) if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert found & set(SCRIPTS) <= set(SCRIPTS[:SCRIPTS.index(name)])
    assert not found & {"transformers", "peft", "matplotlib"}
    others = dict(train={"explain", "pages", "plan", "tiny_world"}, sails={"explain", "theory"},
                  model_gemma={"talk"}, lora={"merged"}, sae={"explain"}, eval={"asking"})
    assert {m for m in found if m.startswith(("benchmarks", "tests"))} <= {"benchmarks"}
    inside = {a.name for n in nodes if getattr(n, "module", "") == "benchmarks" for a in n.names}
    assert inside == others.get(name, set())

def test_no_function_is_longer_than_60_lines_but_an_argument_parser():
    assert [key for key, f in FUNCTIONS.items() if f.end_lineno - f.lineno >= 60 and key[1] != "parser"] == []

@pytest.mark.parametrize("name", SCRIPTS)
def test_a_line_holds_one_statement(name):
    statements = [n for n in ast.walk(ast.parse(SOURCE[name])) if isinstance(n, ast.stmt)]
    starts = [n.lineno for n in statements]
    tuples = [n.lineno for n in statements if isinstance(n, ast.Expr) and isinstance(n.value, ast.Tuple)]
    assert [n for n in starts if starts.count(n) > 1] == []
    assert tuples == []                                # `a(), b()` is two statements in disguise

@pytest.mark.parametrize("name", SCRIPTS)
def test_public_names_say_what_they_are_in_a_first_line_of_at_most_90_characters(name):
    nodes = [n for n in ast.parse(SOURCE[name]).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    public = [n for n in nodes if not n.name.startswith("_") and n.name != "main"]
    first = {n.name: (ast.get_docstring(n) or "").split("\n")[0] for n in public}
    assert {name: line for name, line in first.items() if not 0 < len(line) <= 90} == {}

def test_every_function_that_the_readme_names_exists():
    named = re.findall(r"\b(\w+)\.(\w+)", README)
    scripts = [(a, b) for a, b in named if a in SCRIPTS and b not in ("py", "json", "jsonl")]
    assert {a for a, _ in scripts} == {"sails", "lora", "eval", "train"}
    for script, word in scripts:
        assert re.search(rf"^(?:def|class) {word}\b", SOURCE[script], re.M), (script, word)

def test_every_file_and_flag_that_the_readme_names_exists():
    files = set(re.findall(r"\b(?:results|benchmarks|tests)/[\w/.-]*\w", README))
    assert files and [f for f in files if not (TOP / f).exists()] == []
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) - {
        "--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
    every = "".join(SOURCE.values()) + "".join(p.read_text() for p in TOP.glob("benchmarks/*.py"))
    assert [f for f in sorted(flags) if f'"{f}"' not in every] == []

def test_nothing_is_tracked_that_is_neither_text_nor_small():
    if not (TOP / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "-C", TOP, "ls-files"], capture_output=True, text=True).stdout.split("\n")
    sizes = {n: (TOP / n).stat().st_size for n in names if n and (TOP / n).exists()}
    assert max(sizes.values()) < 250_000
