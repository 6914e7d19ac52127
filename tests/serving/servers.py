"""`nsa-fsa serve` in processes of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import NamedTuple

import openai
import psutil

from tests.serving.checkpoints import NEW

START = 600  # seconds at most
END = 30
EXACT = dict(ignore_eos=True, return_token_ids=True)


class Server(NamedTuple):
    port: int
    process: psutil.Process

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def client(self):
        address = f"{self.address}/v1"
        return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)

    def processes(self):
        return [self.process, *self.process.children(recursive=True)]

    def memory(self):
        """Bytes of all processes that the machine holds for them."""
        return sum(x.memory_info().rss for x in self.processes())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(folder, log, *options, port=None, end=signal.SIGTERM, **environment):
    """A server that is up; in the end all of its processes are gone. SIGKILL is sent to each of
    them, as a service manager sends it."""
    port = port or free_port()
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING", "TRITON_INTERPRET"}
    env = {name: x for name, x in os.environ.items() if name not in ours}
    options = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", *options]
    options += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "sparse"]
    with open(log, "w") as output:
        command = [sys.executable, "-m", "nsa_fsa.cli", "serve", str(folder), *options]
        started = subprocess.Popen(
            command,
            env={**env, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(port, psutil.Process(started.pid))
    try:
        wait_for(started, f"{server.address}/health", log)
        yield server
    finally:
        stop(server, end)


def stop(server, end=signal.SIGTERM):
    """Sees to it that all of its processes are gone, also if some are already."""
    if not server.process.is_running():
        return
    processes = server.processes()
    if end == signal.SIGKILL:
        os.killpg(server.process.pid, end)
    else:
        server.process.send_signal(end)
    server.process.wait(END)
    running = [x for x in processes if is_running(x)]
    for process in running:
        process.kill()
    assert not running, f"they outlive {end.name}: {running}"


def is_running(process):
    """After a while in which it can end."""
    last = time.monotonic() + END
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > last:
            return True
        time.sleep(0.1)
    return False


def wait_for(started, health, log):
    end = time.monotonic() + START
    while time.monotonic() < end:
        assert started.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"no server after {START} seconds: {log.read_text()[-4000:]}")


def complete(client, prompt, **options):
    settings = dict(model="sparse", max_tokens=NEW, temperature=0, extra_body=EXACT)
    return client.completions.create(prompt=prompt, **{**settings, **options})


def tokens_of(response):
    return [x.token_ids for x in response.choices]
