"""A chat server on loopback that scores a reply by its last word and spoils a share of its answers by FAULTS.
After `odd` the score is invalid; after `echo` or `after` the data are repeated, before or behind it.
"""
import contextlib
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = dict(one=1, two=2, three=3, four=4, five=5)
FAULTS = "429", "500", "stall", "half", "not chat", "cut", "drip"

def verdict(quoted):
    """What a judge that keeps to the rubric, or a broken one, says about a reply."""
    last, data = json.loads(quoted)["reply"].split()[-1], f"The data were {quoted}"
    said = dict(odd="#thescore: 6", echo=f"{data}\n#thescore: 4", after=f"#thescore: 4\n{data}")
    return said.get(last) or f"#thescore: 1 was my first thought.\n#thescore: **{WORDS[last]}**"

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault, share, stall, headers_too = None, 0., 2., {}
    log_message = lambda *args: None

    def send(self, code, body, announce=None):
        self.send_response(code)
        for name, value in {"Content-Length": str(announce or len(body)), **self.headers_too}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.seen.append((self.headers["Authorization"], asked))
            fault = self.fault or (self.rng.choice(FAULTS) if self.rng.random() < self.share else None)
        text = asked["messages"][-1]["content"]
        good = json.dumps({"choices": [{"message": {"content": verdict(text)}}]}).encode()
        spoilt = {"half": good[:len(good) // 2], "not chat": b'{"choices": []}', "big": good + b" " * 2 ** 20}
        if fault == "stall":
            time.sleep(self.stall)
        elif fault == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drip":
            self.send(200, b"{", announce=len(good))
            for _ in range(int(self.stall / .05)):
                time.sleep(.05)
                self.wfile.write(b" ")
        elif fault:
            self.send(*(200, spoilt[fault]) if fault in spoilt else (int(fault), b"no such key"))
        else:
            self.answered.append(json.loads(text)["reply"])
            self.send(200, good)
        self.close_connection = True

class Server(ThreadingHTTPServer):                     # whose threads are daemons
    handle_error = lambda *args: None                  # a client that was killed hangs up

@contextlib.contextmanager
def serve(**changes):
    """Run a server in a thread: its URL, its handler class (`fault`; replies `seen`, `answered` well)."""
    own = dict(rng=random.Random(0), lock=threading.Lock(), seen=[], answered=[])
    handler = type("Judge", (Handler,), own | changes)
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()
