"""A chat server on loopback that misbehaves on purpose.

It reads the two texts as the rubric asks, scores a reply by its last word (`one` ... `five`), and spoils a
share of its answers by FAULTS, drawn from a seed. A reply that ends in `odd` gets an invalid score; `echo`
repeats the data before the verdict, `after` behind it. Every good answer adds its reply to the log: a second
line for one reply would be a double verdict.
"""
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = dict(one=1, two=2, three=3, four=4, five=5)
FORMS = ("#thescore: {}", "Because.\n#thescore: **{}**", "I see 3 points.\n#thescore: {}.",
         "#thescore: 1 was my first thought.\n#thescore: {}", "<score>{}</score>")
ODD_FORMS = "#thescore: 0", "#thescore: 6", "#thescore: 3/5", "four", "", "#thescore: 4\n#thescore: ?"
FAULTS = "429", "500", "stall", "half", "not chat", "cut", "drip"

def verdict(quoted):
    """What a judge that keeps to the rubric says about a reply."""
    reply = json.loads(quoted)["reply"]
    last = reply.split()[-1]
    pick = sum(map(ord, reply))                        # the same reply always gets the same form
    if last == "odd":
        return ODD_FORMS[pick % len(ODD_FORMS)]
    if last == "echo":
        return f"The data were {quoted}\n#thescore: 4"
    if last == "after":
        return f"#thescore: 4\nThe data were {quoted}"
    return FORMS[pick % len(FORMS)].format(WORDS[last])

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault, share, stall, log, headers_too = None, 0., 2., None, {}

    def log_message(self, *args):
        pass

    def send(self, code, body, announce=None):
        self.send_response(code)
        for name, value in self.headers_too.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(announce or len(body)))
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
            if self.log:
                with self.lock, open(self.log, "a") as f:
                    f.write(json.dumps(json.loads(text)["reply"]) + "\n")
            self.send(200, good)
        self.close_connection = True

class Server(ThreadingHTTPServer):                     # whose threads are daemons
    def handle_error(self, *args):                     # a client that was killed hangs up
        pass

def serve(seed=0, **changes):
    """Start a server in a thread: its URL, its handler class (`fault`, `seen`), the server itself."""
    own = dict(rng=random.Random(seed), lock=threading.Lock(), seen=[])
    handler = type("Judge", (Handler,), own | changes)
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1", handler, server
