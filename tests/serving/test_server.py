"""`nsa-fsa serve`, as the client of OpenAI meets it."""

import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from nsa_fsa.integrations.vllm.serve import server_command
from tests.serving import checkpoints
from tests.serving.checkpoints import NEW
from tests.serving.servers import EXACT, complete, serving, stop, tokens_of


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    with serving(llama.folder, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_it_is_listed(client):
    assert [x.id for x in client.models.list()] == ["sparse"]


def test_completions(client, llama):
    for prompt, expected in zip(llama.prompts, llama.expected, strict=True):
        response = complete(client, prompt)
        assert tokens_of(response) == [expected]
        assert response.usage.prompt_tokens == len(prompt)


def test_text(client, llama):
    tokenizer = checkpoints.make_tokenizer()
    prompt, expected = llama.prompts[-1], llama.expected[-1]
    assert complete(client, tokenizer.decode(prompt)).choices[0].text == tokenizer.decode(expected)


def test_chat_with_a_template(client, llama):
    tokenizer = checkpoints.make_tokenizer()
    messages = [dict(role="user", content=tokenizer.decode(llama.prompts[4]))]
    response = client.chat.completions.create(
        model="sparse", messages=messages, max_tokens=NEW, temperature=0, extra_body=EXACT
    )
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (expected,) = checkpoints.continue_greedily(llama.model, [ids])
    assert response.choices[0].message.content == tokenizer.decode(expected)


def test_streaming(client, llama):
    tokenizer = checkpoints.make_tokenizer()
    chunks = [*complete(client, llama.prompts[-1], stream=True)]
    assert len(chunks) > NEW // 4  # what is ready at the same time comes together
    text = "".join(x.choices[0].text for x in chunks)
    assert text == tokenizer.decode(llama.expected[-1])


def test_a_stream_that_is_left_does_not_stop_the_server(client, llama):
    stream = complete(client, llama.prompts[-1], stream=True, max_tokens=300)
    next(iter(stream))
    stream.close()
    assert tokens_of(complete(client, llama.prompts[4])) == [llama.expected[4]]


def test_logprobs(client, llama):
    found = complete(client, llama.prompts[4], logprobs=3).choices[0].logprobs
    assert len(found.token_logprobs) == NEW
    best = [max(x.values()) for x in found.top_logprobs]
    assert found.token_logprobs == pytest.approx(best)  # greedily


def test_several_answers(client, llama):
    response = complete(client, llama.prompts[5], n=3, temperature=0.8, seed=1)
    assert len({tuple(x) for x in tokens_of(response)}) == 3


def test_stop(client, llama):
    tokenizer = checkpoints.make_tokenizer()
    expected = llama.expected[5]
    stop = tokenizer.decode(expected[9:11])
    choice = complete(client, llama.prompts[5], stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == tokenizer.decode(expected[:9])


def test_sixteen_at_once(client, llama):
    pairs = [*zip(llama.prompts, llama.expected, strict=True)] * 3

    def answer(pair):
        return tokens_of(complete(client, pair[0])) == [pair[1]]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(answer, pairs[:16]))


def test_a_model_of_another_name(client):
    with pytest.raises(openai.NotFoundError, match="dense"):
        complete(client, "aaab", model="dense")


def test_a_prompt_that_is_too_long(client):
    with pytest.raises(openai.BadRequestError, match="1024"):
        complete(client, [5] * 1100)


def test_an_answer_that_reaches_the_longest_length(client):
    choice = complete(client, [5] * 1000, max_tokens=100).choices[0]
    assert choice.finish_reason == "length"
    assert len(choice.token_ids) == 24


def test_the_command_is_the_one_of_this_build():
    command = server_command("somebody/nsa-llama", [])
    assert command[2] == "vllm.entrypoints.openai.api_server"


@pytest.mark.slow
def test_a_server_that_was_stopped_starts_anew(llama, server, tmp_path):
    """On the port that it had, also where it was killed. The last test of this server."""
    tokenizer = checkpoints.make_tokenizer()
    prompt, expected = tokenizer.decode(llama.prompts[-1]), tokenizer.decode(llama.expected[-1])
    stop(server)
    for end in (signal.SIGKILL, signal.SIGTERM):
        with serving(llama.folder, tmp_path / "log", port=server.port, end=end) as again:
            assert complete(again.client(), prompt).choices[0].text == expected
