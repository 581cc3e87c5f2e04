"""data.py - text in, token batches out. Knows text formats, templates and the tokenizer; no model's tensors.

Helpers, files and the hub come first; at first reading begin at `tokenizer and chat templates`.
Letters: B batch, T tokens.   Run it (`python data.py --data FILE`) to see an example's ids and loss mask.
"""
import argparse
import contextlib
import csv
import fnmatch
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from huggingface_hub import HfApi, constants, errors, snapshot_download
from huggingface_hub.utils import tqdm as progress  # honours the hub's switch for bars
from tokenizers import Tokenizer

with contextlib.suppress(ImportError):  # Windows has none; only owned() needs it
    import fcntl

PAD, EOS, BOS = 0, 1, 2  # the same ids in Gemma 2, Gemma 3 and the tiny world

# ---- helpers: errors and arguments ----
class UserError(ValueError):
    """What only the user can mend: one line on stderr, exit code 2, no traceback."""
    def __init__(self, message):
        super().__init__(" ".join(plain(str(message)).split()))

def need(condition, message, kind=UserError):
    """UserError unless the condition holds."""
    if not condition:
        raise kind(message)

@contextlib.contextmanager
def expecting(what, *kinds):
    """Turn errors of these kinds into UserErrors that begin with `what`."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{what}: {e}") from None

class Arguments(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors and whose help shows defaults."""
    def __init__(self, **more):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more)

    def error(self, message):
        raise UserError(f"{message[:300]} (--help lists the options)")

    def parse_args(self, args=None, namespace=None):
        """argparse's own, but for texts that are empty or can't be encoded."""
        args = sys.argv[1:] if args is None else args
        for before, text in zip(["", *args], args):
            with expecting(f"{before}: not UTF-8 text", UnicodeEncodeError):
                bad = not text.encode() or "\0" in text or re.fullmatch("--[a-z-]+=", text)
                need(not bad, f"{before} {text!r}: an empty text or a zero byte")
        return super().parse_args(args, namespace)

    def refuse_unread(self, *rules):
        """UserError for a typed option that nothing reads. Rules: (holds, what it takes, options)."""
        names = {a.dest: "/".join(a.option_strings) for a in self._actions}
        typed = vars(self.parse_args(None, argparse.Namespace(**dict.fromkeys(names))))  # without defaults
        for option, wanted in [(o, x) for holds, x, some in rules if not holds for o in some.split()]:
            need(typed[option] is None, f"{names[option]} is not read here; it needs {wanted}")

def at_least(low, kind=int, high=None):
    """An argument's type: a number from low to high; the default limits nobody."""
    high = high or (10 ** 9 if kind is int else 1e18)

    def number(text):
        need(low <= kind(text) <= high, f"must be from {low} to {high:g}", argparse.ArgumentTypeError)
        return kind(text)
    return number

def list_of(kind, choices=()):
    """An argument's type: different values, separated by commas."""
    def values(text):
        out = [kind(x) for x in text.split(",")]
        good = len(set(out)) == len(out) and set(out) <= set(choices or out)
        need(good, f"wanted different values {','.join(choices)}", argparse.ArgumentTypeError)
        return out
    return values

def device(text):
    """An argument's type: cpu, or a cuda device that torch sees."""
    seen = ["cpu", *(x for i in range(torch.cuda.device_count()) for x in ("cuda", f"cuda:{i}"))]
    need(text in seen, f"torch sees {', '.join(dict.fromkeys(seen))}", argparse.ArgumentTypeError)
    return text

# ---- helpers: a process, its streams and its signals ----
AGAIN = "the same command (a single run: with --resume) goes on"

def run_main(main):
    """Run a script's main(): an error is one line and exit code 2, a signal says how to go on."""
    sys.stdout, sys.stderr, code = _Stream(sys.stdout), _Stream(sys.stderr), 2
    on_signals(interrupt)
    try:
        done = main()
        if dist.is_initialized():
            together()  # nobody finds another gone
            os._exit(done or 0)  # torch can abort a plain exit
        code = done
    except (UserError, OSError, UnicodeError, MemoryError, RuntimeError) as e:
        why = " ".join(str(e).split())[:2000] or "out of memory"
        if dist.is_initialized() and (isinstance(e, dist.DistError) or re.search("gloo|Connection ", why)):
            why = GONE
        elif isinstance(e, RuntimeError) and not re.search("allocate memory|out of memory", why):
            raise
        last_word(f"error: {why}", code)
    except KeyboardInterrupt as e:
        code = 128 + (*e.args, signal.SIGINT)[0]
        last_word(f"stopped; {AGAIN} from what was saved", code)
    sys.exit(code)

def note(line):
    """Print a line on stderr."""
    print(line, file=sys.stderr)

class _Stream:
    """A standard stream: what no reader takes is dropped, control characters spelt out."""
    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")  # dict: a stream without it

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Write and flush, whether anybody reads or not."""
        try:
            self.stream.write(plain(text) if text.strip("\x1b[A") else text)  # inner bars go up
            self.stream.flush()
        except OSError:  # a closed terminal, `| head`: no reason to end hours of work
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

def plain(text):
    """A text in which no character drives a terminal, turns a line around or can't be printed."""
    unseen = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(unseen, lambda found: ascii(found[0])[1:-1], text)

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

def on_signals(act):
    """Call act(number, frame) at a signal; the handlers before, by number."""
    return {number: signal.signal(number, act) for number in SIGNALS}

def interrupt(number, frame):
    """Stop at once: no file is ever half-written."""
    raise KeyboardInterrupt(number)

@contextlib.contextmanager
def patience():
    """Let signals wait while something is done; yields the list of those that came."""
    came = []
    before = on_signals(lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        for number, act in before.items():
            signal.signal(number, act)
    if came:
        raise KeyboardInterrupt(came[0])

def say(*lines):
    """Print lines, once for all processes."""
    if lead():
        print(*lines, sep="\n")

def follow_parent():
    """End this process when its parent is gone: nobody waits for its work."""
    parent = parent_process()  # noted before this process began; it may be gone
    pid = parent.pid if parent else os.getppid()

    def watch():
        while os.getppid() == pid:
            time.sleep(.1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

# ---- helpers: torchrun's processes, the ranks ----
# All go through the same calls in the same order; rank 0 alone prints and writes
GONE = f"another process of this torchrun is gone; {AGAIN}"

def join(device):
    """Become one of torchrun's ranks; this rank's device.
    Calls may wait a day for rank 0's work; gloo tells a lost connection at once."""
    told = {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    need(told, "RANK is set, but not all that torchrun sets: unset it")
    if device.startswith("cuda"):
        at, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        need(at < there, f"--nproc-per-node: more processes than GPUs, {there}")
        device = f"cuda:{at}"
        torch.cuda.set_device(device)
    follow_parent()
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return device

def last_word(line, code):
    """Print why all ends, once for all ranks; a rank ends here: others may never answer."""
    told, env = 0, os.environ
    if "RANK" in env:
        on_signals(lambda number, frame: None)  # torchrun ends who is here; the word comes first
    if dist.is_initialized():
        at, life = (env["MASTER_ADDR"], int(env["MASTER_PORT"])), env.get("TORCHELASTIC_RESTART_COUNT")
        with contextlib.suppress(RuntimeError):  # torchrun's store may be gone
            told = dist.TCPStore(*at, is_master=False, timeout=timedelta(seconds=9)).add(f"said {life}", 1)
    elif env.get("RANK", "0") != "0":
        time.sleep(1)  # what rank 0 refuses too ends this process first
    if told < 2:
        note(line)
    if dist.is_initialized():
        os._exit(code)

def ranks():
    """(this process's rank, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def lead():
    """True in the process that prints and writes: the only one, or rank 0."""
    return ranks()[0] == 0

def together():
    """Wait for all ranks."""
    gather(None)

def gather(value):
    """Every rank's value, in order."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

def add_up(*tensors):
    """Add tensors up over ranks, in place."""
    for t in tensors if ranks()[1] > 1 else ():
        dist.all_reduce(t)

def share(items, desc):
    """Yield (item, whether it counts) of this rank's share of the work, with a bar.
    All get as many, because a sharded model answers only when all ask: some work counts elsewhere."""
    (rank, n), last = ranks(), len(items)
    quiet = None if lead() and last > 1 else True
    for i in progress(range(rank, -(-last // n) * n, n), desc=desc, disable=quiet):
        yield items[i % last], i < last

# ---- helpers: files ----
@contextlib.contextmanager
def owned(folder, marker):
    """Lend a folder to this process alone; yields whether work on it had begun.
    It is new, or empty, or holds `marker`, which no other program writes. What begins here and fails leaves
    nothing, unless there is work worth going on with."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    with expecting(f"cannot use {folder} as a folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        with expecting(f"another process works in {folder}; wait, or choose another --out", BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for part in folder.glob(".*.part"):  # of a killed process
            part.unlink()
        begun = (folder / marker).exists()
        need(begun or not any(folder.iterdir()), f"{folder} has files in it but no {marker}: not ours")
        try:
            yield begun
        except BaseException:
            worth = [f for f in folder.rglob("*") if f.name in WORTH_KEEPING and f.stat().st_size]
            if not begun and not worth:
                for path in [*sorted(folder.rglob("*"), reverse=True), *new]:  # inner ones first
                    with contextlib.suppress(OSError):  # another run has begun in it
                        path.rmdir() if path.is_dir() else path.unlink()
            raise
    finally:
        os.close(handle)

WORTH_KEEPING = ("state.safetensors", "results.json", "responses.jsonl", "params.npz")

@contextlib.contextmanager
def replacing(path):
    """Yield a path beside `path` that takes its place in one rename: no reader sees half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with expecting(f"cannot write {path}", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.touch()
            mode = beside.stat().st_mode  # what the umask allows; safetensors writes 0600
            yield beside
            beside.chmod(mode)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

def write_text(path, text):
    """Write a UTF-8 file, once for all processes."""
    if lead():
        with replacing(path) as beside:
            beside.write_text(text, encoding="utf-8")

def _json(value, path, **more):
    with expecting(f"{path}: not written, a number is not finite", ValueError):
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **more) + "\n"

def write_json(path, value):
    """Write a JSON file."""
    write_text(path, _json(value, path, indent=1))

def write_rows(path, rows):
    """Write a JSONL file."""
    write_text(path, "".join(_json(r, path) for r in rows))

def append_rows(path, rows):
    """Add lines to a JSONL file, once for all processes, on the disk when this returns."""
    if not lead():
        return
    with expecting(f"cannot write {path}", OSError), open(path, "ab") as f:
        f.write("".join(_json(r, path) for r in rows).encode())
        f.flush()
        os.fsync(f.fileno())

def damaged(path):
    """How to get a file again: in the hub's cache its content lies elsewhere."""
    return f"if it is damaged, delete {Path(path).resolve()} and get it again"

def read_bytes(path):
    """A file's content, unpacked if it is a .gz; UserError if it can't be read."""
    need(os.path.isfile(path), f"no such file: {path}")
    most = 10 ** 6 + 100 * os.path.getsize(path)  # text is packed to a tenth, a bomb to a thousandth
    raw = bytearray()
    with expecting(f"{path}: cannot be read; {damaged(path)}", OSError, EOFError, zlib.error):
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as f:
            while len(raw) <= most and (part := f.read(2 ** 20)):  # read(most) would allocate it
                raw += part
    need(len(raw) <= most, f"{path}: unpacks to more than {most:,} bytes, which is no text")
    return raw

def read_text(path):
    """A text file's content; UserError unless it is UTF-8."""
    with expecting(f"{path}: not a UTF-8 text file", UnicodeDecodeError):
        return read_bytes(path).decode("utf-8-sig")

def parse(raw, where):
    """One JSON value; UserError also if too deep, or with NaN or half a character in it."""
    with expecting(f"{where}: not usable JSON", ValueError, RecursionError):
        value = json.loads(raw)
    for key, x in value.items() if isinstance(value, dict) else [("", value)]:
        with expecting(f"{where}: {key!r:.60}", ValueError, RecursionError):
            json.dumps([key, x], ensure_ascii=False, allow_nan=False).encode()
    return value

def read_json(path, **kinds):
    """One JSON file's value, or, with kinds, its object, see check."""
    value = parse(read_bytes(path), path)
    return check(value, path, **kinds) if kinds else value

def read_rows(path, growing=False, **kinds):
    """[(line number, object)] of a .jsonl or .jsonl.gz file, see check.
    growing: a file of append_rows. It may not exist yet; a half last line, left by a kill, is no row."""
    raw = b"" if growing and not Path(path).exists() else read_bytes(path)
    rows, last = [], raw.count(b"\n") + 1 if growing else 0
    for n, line in enumerate(raw.splitlines(), 1):
        with contextlib.suppress(*[UserError] * (n == last)):
            row = parse(line.strip() or b"{}", f"{path} line {n}")
            rows += [(n, check(row, f"{path} line {n}", **kinds))] if line.strip() else []
    return rows

POSITIVE = "a positive number"

def check(row, where, **kinds):
    """The row; UserError unless it is an object whose values are of these kinds.
    A kind is a type, a range for a whole number, POSITIVE, None for a key that may be missing or null, a text
    for that very text, or a tuple of these."""
    need(isinstance(row, dict), f"{where}: wanted one JSON object")
    for key, some in kinds.items():
        value, some = row.get(key), some if isinstance(some, tuple) else (some,)
        wanted = " or ".join(str(getattr(kind, "__name__", kind)) for kind in some)
        good = any(_is(value, kind) for kind in some)
        need(good, f"{where}: {key} is {repr(value)[:60]}, wanted {wanted}")
    return row

def _is(value, kind):
    if kind == POSITIVE:
        return type(value) in (int, float) and 1e-12 < value < 1e12
    if isinstance(kind, range):
        return type(value) is int and value in kind
    return type(value) is kind or not isinstance(kind, type) and value == kind

def same_settings(path, settings):
    """Write settings, git commit and versions to path; UserError if it has other settings."""
    if not path.exists():
        packages = ("torch", "numpy", "safetensors", "tokenizers", "huggingface-hub")
        versions = {p: importlib.metadata.version(p) for p in packages}
        return write_json(path, dict(settings=settings, git=_git_commit(), versions=versions))
    old, new = read_json(path, settings=dict)["settings"], json.loads(json.dumps(settings))
    changed = [f"{k} was {old.get(k)!r}, now {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)]
    need(not changed, f"{path.parent} began with other settings ({'; '.join(changed)}); use another --out")

def _git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    done = shutil.which("git") and subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done else None

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # t(.975), df 1 to 10

def t_interval(values):
    """(mean, half-width of its 95 % interval by Student's t) of independent values."""
    v, df = np.asarray(values, dtype=float), len(values) - 1
    t = STUDENT[df - 1] if df <= 10 else 1.96 + 2.63 / df  # right to .006
    return float(v.mean()), float(t * v.std(ddof=1) / len(v) ** .5) if df else np.nan

# ---- files from a local folder or the hub ----
def listing(spec, kind="model"):
    """The file names of a folder, a data file, or a hub id owner/name[@revision]."""
    return (_local(spec, kind) or _resolve(*_hub_id(spec, kind), kind))[1]

def fetch(spec, names, kind="model"):
    """Download the named files if needed; (their folder, commit sha or None for a local folder).
    names: exact ones, each of which must exist, or patterns in which * stays inside one folder level. Nothing
    else is downloaded. Failures are UserErrors."""
    folder, files, sha = _local(spec, kind) or _resolve(*_hub_id(spec, kind), kind)
    where = f"{spec} (the cached copy; unset HF_HUB_OFFLINE to download)" if folder and sha else spec
    wanted = _pick(names, files, where)
    if folder is None:
        repo, rev = _hub_id(spec, kind)
        get = functools.partial(snapshot_download, repo, repo_type=kind, allow_patterns=wanted)
        with _hub_errors(repo, rev, kind):
            folder = get(revision=rev)  # by name: the client notes its commit for offline mode
            if Path(folder).name != sha:  # pushed to since the look-up: one run reads one commit
                folder = get(revision=sha)
    return Path(folder), sha

def fingerprint(spec, names, kind="model"):
    """What identifies files: the hub's commit sha, or a hash of local contents."""
    folder, sha = fetch(spec, names, kind)
    paths = sorted(folder / f for f in _pick(names, listing(spec, kind), spec)) if sha is None else ()
    lines = (f"{p.name} {_sha256(p, p.stat().st_size, p.stat().st_mtime_ns)}\n" for p in paths)
    return sha or hashlib.sha256("".join(lines).encode()).hexdigest()[:16]

@functools.lru_cache(maxsize=None)  # every run of a comparison asks
def _sha256(path, size, changed):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def _local(spec, kind):
    """(folder, names, None) of a local path, else None: a path wins over a hub id."""
    with expecting(spec, RuntimeError):
        path = Path(spec).expanduser()
    need(kind == "dataset" or not path.is_file(), f"{spec} is a file; give the folder that it lies in")
    if path.is_dir():
        return path, sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()), None
    return (path.parent, [path.name], None) if path.is_file() else None

def _hub_id(spec, kind):
    repo, _, rev = str(spec).partition("@")
    good = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo) and not str(spec).endswith("@")
    need(good, f"no such {'file or ' * (kind == 'dataset')}folder: {spec}; a hub id is owner/name[@revision]")
    return repo, rev or None

@functools.lru_cache(maxsize=None)  # one look-up: a run reads one commit of a repository
def _resolve(repo, rev, kind):
    """(None, or without an answer the cached snapshot's folder; file names; commit sha)."""
    where = dict(repo_type=kind, revision=rev)
    with _hub_errors(repo, rev, kind):
        try:
            found = _info(repo, where)
            return None, sorted(f.rfilename for f in found.siblings), found.sha
        except Exception as e:
            if isinstance(e, errors.HfHubHTTPError) and not _busy(e):
                raise  # the hub's own answer; anything else: no hub answered
            try:
                folder = Path(snapshot_download(repo, **where, allow_patterns=[], local_files_only=True))
            except errors.LocalEntryNotFoundError:
                raise e from None
            if not isinstance(e, errors.OfflineModeIsEnabled):
                note(f"note: no answer from the hub ({type(e).__name__}); using the cached copy of {repo}")
            return folder, _local(folder, kind)[1], folder.name

def _info(repo, where, pauses=(1, 2, 4)):
    """What the hub says of a repository, asked again after seconds while it is busy."""
    try:
        return HfApi().repo_info(repo, **where)
    except errors.HfHubHTTPError as e:
        if not pauses or not _busy(e):
            raise
    time.sleep(pauses[0])
    return _info(repo, where, pauses[1:])

def _busy(error):
    return error.response.status_code == 429 or error.response.status_code >= 500

def _pick(names, files, where):
    """The files that names select; UserError for a missing one, or for none at all."""
    picked, some = [], ", ".join(files[:6] + (["..."] if len(files) > 6 else [])) or "nothing"
    for name in names:
        like = lambda f: fnmatch.fnmatchcase(f, name) and f.count("/") == name.count("/")
        hits = [f for f in files if f == name or like(f)]
        need(hits or set("*?[") & set(name), f"{where} has no file {name}; it holds {some}")
        picked += hits
    need(picked, f"{where} has no file like {' or '.join(names)}")
    return picked

@contextlib.contextmanager
def _hub_errors(repo, rev, kind):
    """Turn what the hub's client raises into one line with the way out."""
    page = f"{HfApi().endpoint}/{'datasets/' * (kind == 'dataset')}{repo}"
    cache, login = constants.HF_HUB_CACHE, "log in with `hf auth login`"
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        while isinstance(e, errors.LocalEntryNotFoundError) and isinstance(e.__cause__, Exception):
            e = e.__cause__  # "not in the cache" hides why the hub was of no help
        why = " ".join(f"{type(e).__name__}: {getattr(e, 'server_message', None) or e}".split())[:200]
        is_a, status = functools.partial(isinstance, e), getattr(getattr(e, "response", 0), "status_code", 0)
        secret = is_a(UnicodeEncodeError) or "header value" in str(e)  # the message would show the token
        advice = next(text for applies, text in (
            (secret, f"your token holds characters that no token has: set HF_TOKEN anew, or {login} again"),
            (is_a(errors.GatedRepoError), f"gated: accept its terms there, then {login} or set HF_TOKEN"),
            (is_a(errors.RepositoryNotFoundError), f"no such path or {kind}: mind the spelling; or {login}"),
            (is_a(errors.RevisionNotFoundError), f"no revision {rev}: /tree/main shows branches and tags"),
            (status == 401, f"the hub refused your token: {login} again, or unset an old HF_TOKEN"),
            (is_a((errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)),
             f"not in the cache {cache}: unset HF_HUB_OFFLINE to download"),
            (is_a(errors.EntryNotFoundError), "a file is gone though still listed: see its /tree/main"),
            (is_a(PermissionError) or "No space left" in str(e),
             f"cannot write to {cache}: free space, or set HF_HOME to another folder"),
            (status, "try again later"),
            (re.search("CAS|reconstruct", str(e)), "if its storage is blocked, set HF_HUB_DISABLE_XET=1"),
            (True, "check the network and run it again: what is there is kept")) if applies)
        raise UserError(f"{page}: {advice} [{type(e).__name__ if secret else why}]") from None

# ---- tokenizer and chat templates ----
def load_tokenizer(spec, vocab_size=None):
    """The tokenizers.Tokenizer of a model; <bos> must be 2, as in every Gemma.
    vocab_size: the model's. Words have ids below it; Gemma 3's marker of an image, in no text, has not."""
    path = fetch(spec, ["tokenizer.json"])[0] / "tokenizer.json"
    with expecting(f"{path}: not a tokenizer file", Exception):  # the library raises no other kind
        tok = Tokenizer.from_file(str(path))
    need(tok.token_to_id("<bos>") == BOS, f"{path}: <bos> is not token {BOS}, as in every Gemma; wrong file?")
    added = (i for i, token in tok.get_added_tokens_decoder().items() if not token.special)
    most = 1 + max([tok.get_vocab_size(with_added_tokens=False) - 1, *added])
    need(most <= (vocab_size or most), f"{path}: {most} words, the model has {vocab_size}; wrong file?")
    tok.no_padding()  # some published files switch these on
    tok.no_truncation()
    return tok

# What stands around a user's text, before a reply, before any text, at a reply's end and after it. The end is
# trained on, else a model never learns to stop; what follows is not.
TEMPLATES = {
    # Gemma's chat turns; the official template trims every text and has no system role
    "gemma": dict(user=("<start_of_turn>user\n", "<end_of_turn>\n"), model="<start_of_turn>model\n", lead="",
                  end="<end_of_turn>", after="\n"),
    # HH-RLHF's own form, for base models, which have never seen Gemma's turn markers
    "hh": dict(user=("\n\nHuman:", ""), model="\n\nAssistant:", lead=" ", end=EOS, after=""),
    "tiny": dict(user=("<user>", ""), model="<model>", lead="", end="<end>", after=""),
}

def default_template(spec, tok=None):
    """Which template a model reads: the tiny world's, Gemma's for names with -it, else HH's."""
    if tok is not None and tok.token_to_id("<user>") is not None:
        return "tiny"
    return "gemma" if re.search(r"-it($|[-_])", model_name(spec)) else "hh"

def model_name(spec):
    """A folder's or repository's own name, without revision, of the hub's cache too."""
    return re.split("@|/snapshots/", str(spec))[0].rstrip("/").split("/")[-1]

def stop_ids(tok, template):
    """The ids that end a reply: always eos, and <end_of_turn> (107 in Gemma 2, 106 in Gemma 3)."""
    return {EOS, _end(tok, template)}

def _end(tok, template):
    end = TEMPLATES[template]["end"]
    found = end if end == EOS else tok.token_to_id(end)
    need(found is not None, f"template {template}: the tokenizer has no {end}; choose another --template")
    return found

FORGED = re.compile(r"\n\n+(?=(?:Human|Assistant):)")  # begins a turn in HH's form, which has no markers

def own_turn(text, template):
    """A reply without the turns after it: in HH's form a base model speaks both sides."""
    return (FORGED.split(text)[0] if template == "hh" else text).strip()

def note_forged(examples, template):
    """Say how many examples hold a turn's beginning, which render_chat will defuse."""
    texts = lambda ex: [*(t["content"] for t in ex["turns"]), ex.get("chosen"), ex.get("rejected")]
    n = sum(any(FORGED.search(x or "") for x in texts(ex)) for ex in examples) * (template == "hh")
    if n:
        note(f"note: {n} of {len(examples)} examples hold a turn's beginning; it is written as plain text")

def render_chat(tok, turns, reply=None, template="gemma"):
    """A conversation as ids and loss mask, for training, scoring and generation alike.
    turns [{"role": "user" | "assistant", "content": str}, ...], first and last from the user; without a reply
    the prompt alone. mask is 1 on the reply's tokens and its end token. Markers and contents are encoded
    apart, so no content forges a marker, and a prompt's ids begin the whole."""
    t, turns, end = TEMPLATES[template], as_turns(turns), [_end(tok, template)]
    marks = functools.partial(_encode, tok, plain=False)
    tame = lambda text: FORGED.sub("\n", text) if template == "hh" else text
    content = lambda text: encode_plain(tok, t["lead"] + tame(text.strip()))
    ids = [BOS]  # its one owner: the tokenizer would add another
    for turn in turns:
        if turn["role"] == "user":
            ids += marks(t["user"][0]) + content(turn["content"]) + marks(t["user"][1])
        else:
            ids += marks(t["model"]) + content(turn["content"]) + end + marks(t["after"])
    ids += marks(t["model"])
    if reply is None:
        return ids, [0] * len(ids)
    trained, after = content(reply) + end, marks(t["after"])
    return ids + trained + after, [0] * len(ids) + [1] * len(trained) + [0] * len(after)

def encode_plain(tok, text):
    """The ids of a text in which nothing is a marker: <bos> is five letters."""
    return _encode(tok, text, plain=True)

def _encode(tok, text, plain):
    tok.encode_special_tokens = plain
    return tok.encode(text, add_special_tokens=False).ids

def as_turns(prompt):
    """A prompt (a text or a list of turns) as turns: user, assistant, ..., user, with texts."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    good = isinstance(turns, list) and all(isinstance(t, dict) for t in turns) and len(turns) % 2
    need(good, "a prompt must be a text or a list of turns, the first and the last from the user")
    for i, turn in enumerate(turns):
        want, role = ("user", "assistant")[i % 2], turn.get("role")
        need(role == want, f"prompt: turn {i} has role {role!r}, wanted {want!r}; Gemma has no system role: "
             "put its text into the first user turn")
        need(isinstance(turn.get("content"), str), f"prompt: turn {i} has no text under 'content'")
    return turns

# ---- pairs, prompts, plain text ----
PARTS = ("train", "validate", "test", "prompts", "knowledge", "text")

def data_files(spec):
    """(folder, {part: file name}) of --data: a file (train), a folder or a hub dataset.
    train      preference pairs or replies to train on     test     held-out pairs, scored only
    validate   pairs by which a learning rate is chosen    prompts  labelled prompts to answer and judge
    knowledge  texts and what must follow, see read_cloze  text     plain text, for --replay and --sae fit
    A folder holds PART.jsonl, .jsonl.gz or .txt, at least train; of HH-RLHF harmless-base is read."""
    if Path(spec).is_file():
        return Path(spec).parent, dict(train=Path(spec).name)
    files, form = listing(spec, "dataset"), r"(?:harmless-base/)?(\w+)\.(?:jsonl|jsonl\.gz|txt)"
    matches = [m for f in files if (m := re.fullmatch(form, f)) and m[1] in PARTS]
    found = {m[1]: m[0] for m in matches}
    need(len(found) == len(matches), f"{spec}: two files of one part among {[m[0] for m in matches]}")
    need("train" in found, f"{spec}: no train.jsonl or train.jsonl.gz; it holds {', '.join(files[:6])}")
    return fetch(spec, list(found.values()), "dataset")[0], found

def read_pairs(path):
    """Read preference pairs or replies; (examples, {reason: rows left out}).
    {"chosen", "rejected"}            HH-RLHF: two whole dialogues that share all but the last reply
    {"prompt", "chosen", "rejected"}  prompt is a text or a list of turns
    {"prompt", "response"}            no rejected reply: for plain fine-tuning
    Any row may have "label" ("harmful" | "benign") and "id". Examples: id, turns, chosen, rejected, label."""
    examples, dropped = [], Counter()
    text = (str, None)
    kinds = dict(label=("harmful", "benign", None), chosen=text, rejected=text, response=text)
    for n, row in read_rows(path, id=(str, int, None), **kinds):
        with expecting(f"{path} line {n}", UserError):
            ex = _pair(row) | {"id": str(n if row.get("id") is None else row["id"])}
        if not ex["turns"]:
            dropped[NO_PAIR] += 1
        elif not all(text.strip() for text in (ex["chosen"], ex["rejected"]) if text is not None):
            dropped["empty reply"] += 1
        else:
            examples.append(ex)
    need(examples, f"{path}: no usable example in it (left out: {dict(dropped)})")
    return examples, dict(dropped)

def _pair(row):
    """One row as an example; turns is [] where the row is NO_PAIR."""
    label, chosen, rejected = row.get("label"), row.get("chosen", row.get("response")), row.get("rejected")
    whole = chosen is not None and (rejected is not None or {"prompt", "response"} <= row.keys())
    need(whole, f"keys {sorted(row)}; wanted prompt + response, prompt + chosen + rejected, or HH's pair")
    if "prompt" in row:
        return dict(turns=as_turns(row["prompt"]), chosen=chosen, rejected=rejected, label=label)
    (turns, chosen), (other, rejected) = split_hh(chosen), split_hh(rejected)
    return dict(turns=turns if turns == other else [], chosen=chosen, rejected=rejected, label=label)

NO_PAIR = r"not two dialogues '\n\nHuman: ... \n\nAssistant: ...' that share their prompt"

def split_hh(text):
    """An HH-RLHF dialogue as (turns, last reply), without turns if it is none.
    Two blocks by one side are joined."""
    parts = re.split(r"\n\n(Human|Assistant):", text)
    if len(parts) < 5 or parts[0].strip() or (parts[1], parts[-2]) != ("Human", "Assistant"):
        return [], text
    turns = []
    for who, content in zip(parts[1::2], parts[2::2]):
        role = "user" if who == "Human" else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content.strip()
        else:
            turns.append({"role": role, "content": content.strip()})
    return turns[:-1], turns[-1]["content"]

def split_by_prompt(examples, shares, seed=0):
    """Split examples into len(shares) lists; rows with one first prompt stay together."""
    groups = {}  # HH repeats first prompts
    for ex in examples:
        groups.setdefault(ex["turns"][0]["content"], []).append(ex)
    keys = sorted(groups)
    order = np.random.default_rng(seed).permutation(len(keys))
    cuts = np.cumsum([0, *shares]) / sum(shares) * len(keys)
    return [[ex for k in order[round(a):round(b)] for ex in groups[keys[k]]] for a, b in zip(cuts, cuts[1:])]

# The columns of XSTest (id,prompt,type,label), AdvBench (goal,target), JailbreakBench (Index,Goal,Target),
# HarmBench (Behavior,BehaviorID), StrongREJECT (forbidden_prompt). target is what an attack aims at, in
# preference data the rejected reply; expected is how a right answer begins.
COLUMNS = dict(text=("prompt", "goal", "forbidden_prompt", "behavior"), id=("id", "behaviorid", "index"),
               target=("target", "rejected"), expected=("chosen",))
LABELS = dict(safe="benign", benign="benign", unsafe="harmful", harmful="harmful") | {None: None, "": None}

def read_prompts(paths, limit=None):
    """Prompts, the first `limit` of each file: dicts id, set, turns, label, target, expected.
    paths: csv, jsonl or txt files, folders or hub data sets of them. label "benign": to be answered (XSTest's
    safe half); all others are to be refused."""
    out = []
    for spec in paths:
        for file in prompt_files(spec):
            rows = _prompt_rows(file)[:limit]
            need(rows, f"{file}: no prompt in it")
            for n, row in enumerate(rows, 1):
                with expecting(f"{file}: row {n}", UserError):
                    out.append(_prompt(row, n, file.name.split(".")[0]))
    [(most, n)] = Counter(p["id"] for p in out).most_common(1)
    need(n == 1, f"{n} prompts have the id {most}; rename a file or mend its id column")
    return out

PROMPTS = [start + end for start in ("*", "data/*") for end in (".csv", ".jsonl", ".jsonl.gz", ".txt")]

def prompt_files(spec):
    """A prompt file alone; of a folder or a hub data set those at its top level or in data/."""
    path = Path(spec)
    if not path.is_dir() and (path.exists() or any(map(path.match, PROMPTS))):  # mistyped, it is no hub id
        return [path]
    folder, _ = fetch(spec, PROMPTS, "dataset")
    return sorted(file for form in PROMPTS for file in folder.glob(form) if file.is_file())

def _prompt_rows(path):
    """A prompt file's rows as dicts with lower-case names."""
    if path.suffix == ".txt":
        return [{"prompt": line} for line in read_text(path).splitlines() if line.strip()]
    if path.suffix != ".csv":
        rows = [{k.lower(): v for k, v in row.items()} for _, row in read_rows(path)]
        if rows and "prompt" not in rows[0] and "chosen" in rows[0]:  # HH-RLHF: less its last reply
            return [dict(prompt=ex["turns"], label=ex["label"], id=ex["id"]) for ex in read_pairs(path)[0]]
        return rows
    table = csv_table(path)
    if re.fullmatch(r"category_\d+", path.stem) and {len(r) for r in table} == {1}:
        # HEx-PHI has no header: the first line is a prompt. The hub lacks category_2: 300 prompts, not 330
        return [dict(prompt=r[0], set="HEx-PHI", id=f"{path.stem}-{n}") for n, r in enumerate(table, 1)]
    names = [c.strip().lower() for c in table[0]]
    need(len(set(names)) == len(names), f"{path}: two columns have one name: {', '.join(names)[:200]}")
    return [dict(zip(names, r)) for r in table[1:]]

def csv_table(path):
    """A csv file's rows, all of one length."""
    with expecting(f"{path}: not a csv file", csv.Error):
        table = [r for r in csv.reader(io.StringIO(read_text(path), newline=""), strict=True) if any(r)]
    need(table, f"{path}: nothing in it")
    for n, r in enumerate(table, 1):
        need(len(r) == len(table[0]), f"{path}: row {n} has {len(r)} cells, the first row {len(table[0])}")
    return table

def _prompt(row, n, file):
    words = dict.fromkeys(("set", "type", *COLUMNS["target"], *COLUMNS["expected"]), (str, None))
    check(row, "prompt", label=tuple(LABELS), **words, **dict.fromkeys(COLUMNS["id"], (str, int, None)))
    find = lambda names: next((row[c] for c in names if row.get(c) not in (None, "")), None)
    get = {key: find(names) for key, names in COLUMNS.items()}
    need(get["text"], f"keys {sorted(row)}; wanted a text under one of {', '.join(COLUMNS['text'])}; "
         "HH-RLHF's pairs, HEx-PHI's category_N.csv and .txt do without")
    label, group = row.get("label"), row.get("set") or file
    if row.get("type") and "focus" in row:  # XSTest: types contrast_... are the unsafe 200
        label = "harmful" if row["type"].startswith("contrast_") else "benign"
    if row.get("contextstring"):  # as HarmBench puts it
        get["text"] = f"{row['contextstring']}\n\n---\n\n{get['text']}"
    turns = as_turns(get["text"].strip() if isinstance(get["text"], str) else get["text"])
    own = n if get["id"] is None else get["id"]
    return dict(id=f"{group}/{own}", set=group, turns=turns, label=LABELS[label],
                target=get["target"], expected=get["expected"])

def read_texts(path):
    """Plain texts of a folder's .txt files, a file's paragraphs, or a JSONL file's key text."""
    path = Path(path)
    if path.is_dir():
        texts = [read_text(f) for f in sorted(path.glob("**/*.txt"))]
    elif ".jsonl" in path.name:
        texts = [row["text"] for _, row in read_rows(path, text=str)]
    else:
        texts = re.split(r"\n\s*\n", read_text(path))
    texts = [t.strip() for t in texts if t.strip()]
    need(texts, f"{path}: no text in it; wanted .txt files, paragraphs, or JSONL with a key text")
    return texts

def read_cloze(path, tok):
    """Texts (ids, mask) of a JSONL file {"text", "next"}; the mask marks `next`."""
    out = []
    for n, row in read_rows(path, text=str, next=str):
        text, answer = [BOS] + encode_plain(tok, row["text"]), encode_plain(tok, row["next"])
        need(answer, f"{path} line {n}: next is empty")
        out.append((text + answer, [0] * len(text) + [1] * len(answer)))
    need(out, f"{path}: no row in it")
    return out

# ---- batches ----
def encode(tok, examples, template, max_tokens=None):
    """Examples, every text encoded once; (rows, how many were too long).
    A row is the example and its prompt_ids, chosen_tokens and rejected_tokens, (ids, mask) or None."""
    rows = []
    note_forged(examples, template)
    for ex in examples:
        if max_tokens and len(str(ex)) > 100 * max_tokens + 1000:  # 200 MB in one row would take minutes
            continue
        prompt, chosen, rejected = (render_chat(tok, ex["turns"], reply, template)
                                    for reply in (None, ex["chosen"], ex["rejected"]))
        rejected = None if ex["rejected"] is None else rejected
        if max_tokens is None or max(len(ids) for ids, _ in (chosen, rejected or chosen)) <= max_tokens:
            rows.append(dict(ex, prompt_ids=prompt[0], chosen_tokens=chosen, rejected_tokens=rejected))
    return rows, len(examples) - len(rows)

def pad(seqs, side="right"):
    """Lists of ids -> ids (B, T) int64 padded with PAD, keep (B, T) bool."""
    width = max(map(len, seqs))
    gaps = [[PAD] * (width - len(seq)) for seq in seqs]
    rows = [[*seq, *gap] if side == "right" else [*gap, *seq] for seq, gap in zip(seqs, gaps)]
    at = torch.arange(width) if side == "right" else torch.arange(width - 1, -1, -1)
    return torch.tensor(rows, dtype=torch.long), at < torch.tensor([len(seq) for seq in seqs])[:, None]

def batch_at(n, size, seed, step):
    """Indices of batch `step`, a pure function: every epoch is a new permutation of n examples."""
    at = np.arange(step * size, (step + 1) * size)
    order = {e: np.random.default_rng([seed, e]).permutation(n) for e in set((at // n).tolist())}
    return [int(order[p // n][p % n]) for p in at.tolist()]

def length_batches(lengths, size):
    """Lists of indices, longest first: little padding, and what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[a:a + size] for a in range(0, len(order), size)]

def main():
    ap = Arguments(description="Show one example as rows of position, id, token and loss mask.")
    ap.add_argument("--model", default="runs/world-0", help="folder or hub id with a tokenizer.json")
    ap.add_argument("--data", default="runs/world-0/data-0/train.jsonl", help="preference pairs or replies")
    ap.add_argument("--template", choices=TEMPLATES, help="by the model's name")
    ap.add_argument("--row", type=at_least(1), default=1)
    args = ap.parse_args()
    tok, examples = load_tokenizer(args.model), read_pairs(args.data)[0]
    template = args.template or default_template(args.model, tok)
    need(args.row <= len(examples), f"--row {args.row}: {args.data} has {len(examples)} examples")
    ex = examples[args.row - 1]
    ids, mask = render_chat(tok, ex["turns"], ex["chosen"], template)
    print(f"template {template}, {len(ids)} tokens, {sum(mask)} of them trained on")
    for i, (t, m) in enumerate(zip(ids, mask)):
        print(f"{i:5d} {t:7d} {'x' if m else ' '} {tok.id_to_token(t)!r}")

if __name__ == "__main__":
    run_main(main)
