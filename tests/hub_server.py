"""hub_server.py - a hub on loopback for tests: it answers huggingface_hub's client as the real one does.
Serves ROOT/models/owner/name/FILES and ROOT/datasets/...; a folder `name@rev` is another revision of `name`.
Every file is redirected to another host, as the hub does with large ones. Not copied: a tree's pages, and Xet
storage: with hub.xet = True files are said to lie there, and every request to it fails."""
import hashlib
import http.server
import json
import multiprocessing
import os
import runpy
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import torch

XET_TOKEN = {"X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": "4102444800"}

class HubServer(http.server.ThreadingHTTPServer):
    """Serve `root` from a thread: `with HubServer(root) as hub: ... hub.url`. Attributes switch faults on."""
    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = Path(root), f"http://127.0.0.1:{self.server_port}"
        self.cdn = f"http://localhost:{self.server_port}"          # another host: no token may go there
        self.xet, self.log = False, []                 # (method, path, status, headers) of every request
        self.broken = {}                               # repository or file -> (status, X-Error-Code, message)
        self.cut = set()                               # files whose next download loses the last tenth
        threading.Thread(target=self.serve_forever, args=(.01,), daemon=True).start()

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def downloads(self):
        return sorted(h["file"] for method, _, _, h in self.log if method == "GET" and h["file"])

    def folder(self, kind, repo, rev="main"):
        """(folder, sha) of a repository at a branch, tag or sha; (None, None) if there is none."""
        base = self.root / f"{kind}s" / repo
        for path in [base, *base.parent.glob(base.name + "@*")] if base.is_dir() else []:
            sizes = [(name, p.stat().st_size) for name, p in files_of(path).items()]
            sha = hashlib.sha1(repr(sizes).encode()).hexdigest()
            if rev in (sha, path.name.partition("@")[2] or "main"):
                return path, sha
        return None, None

def files_of(folder):
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

etag_of = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True                     # else an answer waits 40 ms for an acknowledgement
    log_message = staticmethod(lambda *args: None)

    def do_GET(self):
        parts = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if parts[0] == "cdn":                          # /cdn/models/owner/name@rev/FILE: a large file's bytes
            self.send_file(self.server.root / "/".join(parts[1:]), "/".join(parts[4:]))
        elif self.token not in ("", "hf_good"):          # Xet storage is asked with one of its own
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif parts[0] == "api" and parts[1] in ("models", "datasets"):
            self.api(parts[1][:-1], "/".join(parts[2:4]), *(parts[4:] or ["revision", "main"]))
        elif parts[0] == "api":                        # the client asks for more on the side, in vain
            self.refuse(404, None, "not here")
        else:
            kind, parts = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
            self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
    do_HEAD = do_GET

    def api(self, kind, repo, what, rev):
        folder, sha = self.find(kind, repo, rev, repo)
        files = files_of(folder) if folder else {}
        if what == "revision" and folder:
            self.answer(200, {}, dict(id=repo, sha=sha, siblings=[{"rfilename": name} for name in files]))
        elif what == "tree" and folder:
            rows = []
            for name, path in files.items():
                about = dict(oid=etag_of(path), size=path.stat().st_size)
                more = dict(xetHash=about["oid"]) if self.server.xet else {}
                rows.append(dict(type="file", path=name, lfs=dict(about, pointerSize=134), **about, **more))
            self.answer(200, {}, rows)
        elif folder:
            self.answer(200, {"X-Xet-Cas-Url": self.server.url} | XET_TOKEN)

    def resolve(self, kind, repo, rev, file):
        """Where a file's bytes are: the answer to HEAD and GET of /ID/resolve/REV/FILE."""
        folder, sha = self.find(kind, repo, rev, file)
        if folder:
            path = folder / file
            headers = {"X-Linked-Etag": f'"{etag_of(path)}"', "X-Linked-Size": str(path.stat().st_size)}
            if self.server.xet:
                token = f"{self.server.url}/api/{kind}s/{repo}/xet-read-token/{sha}"
                headers |= {"X-Xet-Hash": etag_of(path), "Link": f'<{token}>; rel="xet-auth"'}
            where = f"{self.server.cdn}/cdn/{path.relative_to(self.server.root).as_posix()}"
            self.answer(302, headers | {"X-Repo-Commit": sha, "Location": where})

    def find(self, kind, repo, rev, what):
        """(folder, sha), or (None, None) after an answered error. what: the file or repository asked for."""
        folder, sha = self.server.folder(kind, repo, rev)
        if what in self.server.broken:
            self.refuse(*self.server.broken[what])
        elif folder is None and self.server.folder(kind, repo)[0]:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        elif folder is None:                           # strangers are not told that a repository is missing
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        else:
            return folder, sha
        return None, None

    def send_file(self, path, name):
        data, asked = path.read_bytes(), self.headers.get("Range")
        start = int(asked[len("bytes="):].split("-")[0]) if asked else 0
        headers = {"ETag": f'"{etag_of(path)}"', "Accept-Ranges": "bytes"}
        headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut = self.command == "GET" and name in self.server.cut
        self.answer(206 if start else 200, headers, data[start:], len(data) * 9 // 10 if cut else None, name)
        if cut:
            self.server.cut.remove(name)
            self.close_connection = True

    def refuse(self, status, code, message):
        headers = {"X-Error-Code": code} if code else {}
        self.answer(status, headers | {"X-Error-Message": message}, {"error": message})

    def answer(self, status, headers, body=b"", sent=None, file=None):
        """Log and send an answer, of its body (bytes, or a value as JSON) `sent` bytes."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = dict(token=self.headers.get("Authorization"), range=self.headers.get("Range"), file=file)
        self.server.log.append((self.command, self.path, status, asked))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])

# Importing torch takes most of a process's two seconds. A fork server with everything but huggingface_hub
# (which reads its variables when imported) starts a client in a tenth. What is not installed is left out.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload("torch._dynamo safetensors.torch tokenizers httpx2 httpcore2._sync httpx "
                                 "truststore anyio trio requests yaml filelock tqdm.auto".split())

# no other variable of the user's is handed on: those for hub, token and proxy change what a client does
NEEDED = {k: os.environ[k] for k in "PATH LD_LIBRARY_PATH PYTHONPATH TMPDIR".split() if k in os.environ}

def run_script(folder, args, home, **env):
    """Run a script with its arguments, in a new process of one thread with the home folder `home`."""
    env = NEEDED | dict(HOME=str(home)) | env
    child = processes.Process(target=_script, args=(str(folder), [str(a) for a in args], env, home))
    child.start()
    child.join(120)
    assert child.exitcode is not None, f"still running after two minutes: {args}"
    out, err = ((home / name).read_text() for name in ("out", "err"))
    return SimpleNamespace(returncode=child.exitcode, stdout=out, stderr=err)

def _script(folder, args, env, home):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.path.insert(0, folder)
    assert "huggingface_hub" not in sys.modules and "data" not in sys.modules
    torch.set_num_threads(1)                           # with tensors this small threads wait for each other
    sleep, time.sleep = time.sleep, lambda seconds: sleep(seconds / 20)  # between tries
    sys.argv = args
    runpy.run_path(args[0], run_name="__main__")
