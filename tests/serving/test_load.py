"""A server under load: vLLM's own benchmark, by which requests come at random times."""

import threading

import numpy as np
import pytest
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.serving.servers import serving

SECONDS = 6  # at each rate
RATES = (2, 4, 8)  # requests a second


def send(server, folder, rate):
    """What the benchmark says of requests that come at this rate."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = dict(
        base_url=server.address,
        model="sparse",
        tokenizer=folder,
        dataset_name="random",
        random_input_len=200,
        random_range_ratio=0.9,
        random_output_len=16,
        num_prompts=rate * SECONDS,
        request_rate=rate,
        seed=rate,
    )
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return main(parser.parse_args([*flags, "--ignore-eos", "--disable-tqdm"]))


class Watch(threading.Thread):
    """Notes a server's memory while a block runs."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.bytes, self.over = server, [], threading.Event()

    def run(self):
        while not self.over.wait(0.25):
            self.bytes.append(self.server.memory())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


@pytest.mark.slow
def test_three_rates(llama, tmp_path):
    """Every request is answered, and what the server holds stays within 2%, as a dense model's
    does. Pages are few, so that all of them have been written before the server is watched."""
    options = ("--num-gpu-blocks-override", "100", "--max-num-seqs", "16")
    with serving(llama.folder, tmp_path / "log", *options) as server:
        send(server, llama.folder, RATES[-1])
        with Watch(server) as watch:
            results = [send(server, llama.folder, rate) for rate in RATES]
    for rate, found in zip(RATES, results, strict=True):
        assert (found["completed"], found["failed"]) == (rate * SECONDS, 0), found["errors"]
    _, second, last = np.array_split(watch.bytes, 3)
    assert np.median(last) < 1.02 * np.median(second)
