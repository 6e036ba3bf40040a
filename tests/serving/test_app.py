"""The paths of a real server on loopback: answers, streams, refusals, and clients that leave."""

import contextlib
import http.client
import json
import logging
import re
import socket
import time

import jax
import numpy as np
import openai
import pytest

from armd_jax import typed
from armd_jax.names import DecodingMode
from armd_jax.serving.api import Limits
from armd_jax.serving.completions import Answer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

ASK = {"prompt": "the old ", "max_tokens": 12, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(serve):
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def post(served, client):
    """Sends a body, and returns the status and the object of the answer."""

    def send(body, path="/v1/completions", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with client.connection(served.url) as line:
            line.request("POST", path, content, {"Content-Type": "application/json"} | headers)
            answer = line.getresponse()
            return answer.status, json.loads(answer.read() or b"null")

    return send


def _library(lm, **changes):
    """What the library gives for ASK: the text behind the prompt, and the generation."""
    how = {"temperature": 1.0, "streams": 1} | changes
    ids = lm.tokenizer.encode(ASK["prompt"])
    made = lm.generate(prompt=[ids], max_new_tokens=ASK["max_tokens"], seed=[ASK["seed"]], stop_at_end=False, **how)
    return lm.texts(made)[0][len(ASK["prompt"]) :], made


WAYS = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.6},
    *[{"mode": mode, "streams": 3} for mode in typed.choices(DecodingMode)],
]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_an_answer_is_the_text_of_the_library(served, post, client, changes):
    """Whole, and as a stream whose parts have no half characters that the whole does not have."""
    text, _ = _library(served.lm, **changes)
    status, answer = post(ASK | changes)
    (choice,) = answer["choices"]
    assert (status, choice["text"], choice["finish_reason"], choice["index"]) == (200, text, "length", 0)
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": 12, "total_tokens": 20}
    with client.connection(served.url) as line:
        events = list(client.events(client.post(line, ASK | changes | {"stream": True})))
    parts = [event["choices"][0] for event in events]
    assert "".join(part["text"] for part in parts) == text
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_stream_comes_while_the_text_is_written(served, client):
    """A long text comes in several parts, and so do its calls for the page."""
    with client.connection(served.url) as line:
        assert len(list(client.events(client.post(line, ASK | {"max_tokens": 56, "stream": True})))) > 1
    with client.connection(served.url) as line:
        answer = client.post(line, {"text": "a", "max_tokens": 60, "ignore_eos": True}, "/api/generate")
        seconds = [json.loads(row)["seconds"] for row in list(answer)[1:]]
    assert len(seconds) == 61 and len(set(seconds)) > 2 and seconds == sorted(seconds)


def test_choices_have_seeds_of_their_own(served, post):
    """Choice i of a request is what its seed + i gives, whatever the prompts are."""
    prompts = ["the old ", "a", [98, 99]]
    _, answer = post(ASK | {"prompt": prompts[:2], "n": 2})
    found = [choice["text"] for choice in answer["choices"]]
    alone = [
        post(ASK | {"prompt": prompt, "seed": ASK["seed"] + number})[1]["choices"][0]["text"]
        for number, prompt in enumerate(["the old ", "the old ", "a", "a"])
    ]
    assert found == alone and found[0] != found[1]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_parallel_pass(served, post, client, stream):
    """With echo they begin at the prompt, and the likeliest tokens are those of the logits."""
    _, made = _library(served.lm)
    body = ASK | {"logprobs": 3, "echo": True, "stream": stream}
    with client.connection(served.url) as line:
        answer = client.post(line, body)
        objects = list(client.events(answer)) if stream else [json.loads(answer.read())]
    parts = [each["choices"][0]["logprobs"] for each in objects]
    found = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    text = "".join(each["choices"][0]["text"] for each in objects)
    wanted = np.asarray(served.lm.log_prob(made.tokens_BN, made.order))[0]
    np.testing.assert_allclose(found["token_logprobs"], wanted, atol=1e-4)
    name = served.lm.tokenizer.token_text
    assert found["tokens"] == [name(token) for token in made.tokens_BN[0].tolist()]
    assert found["text_offset"][:9] == list(range(9)) and found["text_offset"] == sorted(found["text_offset"])
    assert text == ASK["prompt"] + _library(served.lm)[0]
    all_NV = np.asarray(jax.nn.log_softmax(served.lm.logits(made.tokens_BN, made.order)[0]))
    for at, likeliest in enumerate(found["top_logprobs"]):
        best = np.argsort(-all_NV[at])[:3].tolist()
        assert set(likeliest) == {name(token) for token in best} | {found["tokens"][at]}
        np.testing.assert_allclose([likeliest[name(token)] for token in best], all_NV[at][best], atol=1e-4)


def test_a_text_can_be_scored_alone(served, post):
    """No token is drawn with max_tokens=0, and echo gives the log-probabilities of the prompt."""
    _, answer = post({"prompt": "the old", "max_tokens": 0, "echo": True, "logprobs": 0})
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("the old", "length", 0)
    assert len(choice["logprobs"]["token_logprobs"]) == 7 and choice["logprobs"]["top_logprobs"] is None


def test_a_stop_string_ends_its_own_text_alone(served, post):
    """The same prompt with and without it, at the same time: one text is cut, the other is whole."""
    text, _ = _library(served.lm)
    stop = text[5:7]
    at = text.find(stop)
    status, cut = post(ASK | {"stop": ["no such text", stop]})
    assert (status, cut["choices"][0]["text"], cut["choices"][0]["finish_reason"]) == (200, text[:at], "stop")
    assert cut["usage"]["completion_tokens"] < 12


def test_a_text_ends_at_its_end_of_text(served, post):
    """Found with the library: a seed whose text ends by itself."""
    lm = served.lm
    seeds = list(range(200))
    made = lm.generate(prompt=[[97]] * 200, max_new_tokens=12, seed=seeds)
    row = int(np.flatnonzero((made.end_B < 13) & (made.end_B > 1))[0])
    _, answer = post({"prompt": "a", "max_tokens": 12, "seed": row})
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (lm.texts(made)[row][1:], "stop")
    assert answer["usage"]["completion_tokens"] == made.end_B[row] - 1


def test_a_suffix_is_filled_in_before(served, post):
    """The answer has what stands between prompt and suffix."""
    lm = served.lm
    _, answer = post(ASK | {"suffix": " stone", "max_tokens": 4, "streams": 2})
    known = [*lm.tokenizer.encode("the old "), *[-1] * 4, *lm.tokenizer.encode(" stone")]
    made = lm.generate(evidence_BN=[known], seed=[5], streams=2, stop_at_end=False)
    assert "the old " + answer["choices"][0]["text"] + " stone" == lm.texts(made)[0]


def test_the_page_gets_every_call(served, client):
    """Places, probabilities and calls are those of the library, and so is the text."""
    body = {"text": "the [[5]] old", "max_tokens": 6, "streams": 2, "seed": 3, "ignore_eos": True}
    with client.connection(served.url) as line:
        head, *calls, last = [json.loads(row) for row in client.post(line, body, "/api/generate")]
    known = [*b"the ", *[-1] * 5, *b" old", *[-1] * 6]
    made = served.lm.generate(evidence_BN=[known], seed=[3], streams=2, stop_at_end=False)
    assert (head["length"], head["seed"], head["most_calls"]) == (19, 3, made.num_calls)
    assert dict(head["given"]) == {at: chr(token) for at, token in enumerate(known) if token >= 0}
    found = {at: (call["call"], token, chance) for call in calls for at, token, chance in call["tokens"]}
    name = served.lm.tokenizer.token_text
    for at in np.flatnonzero(made.call_BN[0] > 0).tolist():
        call, token, chance = found.pop(at)
        assert (call, token) == (made.call_BN[0, at], name(int(made.tokens_BN[0, at])))
        assert chance == pytest.approx(np.exp(made.log_prob_BN[0, at]), rel=1e-3)
    assert not found and last["text"] == served.lm.texts(made)[0]
    assert (last["calls"], last["tokens"], last["finish_reason"]) == (made.num_calls, 11, "length")


@pytest.mark.parametrize(
    ("status", "body", "path", "headers", "code", "param"),
    [
        (400, {"prompt": "a", "n": 0}, "/v1/completions", {}, None, "n"),
        (400, b"{", "/v1/completions", {}, None, None),
        (400, {"text": "a"}, "/api/generate", {}, None, "max_tokens"),
        (404, {"model": "other"}, "/v1/completions", {}, "model_not_found", "model"),
        (404, {}, "/v1/chat/completions", {}, None, None),
        (405, {}, "/v1/models", {}, None, None),
        (413, {"prompt": "a" * (1 << 21)}, "/v1/completions", {}, "body_too_large", None),
        (415, {"prompt": "a"}, "/v1/completions", {"Content-Type": "text/plain"}, None, None),
    ],
)
def test_refusals_have_the_form_of_openai(post, status, body, path, headers, code, param):
    """A status, and an object with message, type, param and code."""
    found, answer = post(body, path, **headers)
    error = answer["error"]
    assert found == status and set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"] and "\n" not in error["message"]


def test_a_method_that_a_path_does_not_have_is_told_those_that_it_has(served, client):
    """In the header that belongs to the status."""
    with client.connection(served.url) as line:
        line.request("DELETE", "/v1/completions")
        answer = line.getresponse()
        assert (answer.status, answer.getheader("Allow")) == (405, "POST")
        assert json.loads(answer.read())["error"]["message"]


def test_an_error_within_a_stream_is_told_and_logged(served, client, monkeypatch, caplog):
    """The client gets its kind alone, and the log its traceback; what the user is told of is not logged."""

    def failing(*_):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(Answer, "_usage", failing)
    with caplog.at_level(logging.ERROR), client.connection(served.url) as line:
        body = ASK | {"stream": True, "stream_options": {"include_usage": True}}
        told = client.post(line, body).read().decode()
    assert "ZeroDivisionError" in told and "secret" not in told
    (record,) = [record for record in caplog.records if record.name.startswith("armd_jax")]
    assert record.exc_info[0] is ZeroDivisionError


def test_an_address_of_ipv6_may_be_asked(serve, client):
    """Its name is written in brackets by the client."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no loopback of IPv6 on this machine: {error}")
    with serve(host="::1") as served:
        assert served.url.startswith("http://[::1]:")
        assert json.loads(client.get(served.url, "/health"))["status"] == "ok"


def test_more_texts_than_the_queue_holds_are_a_mistake(serve, client):
    """Trying again could not help; what fills the whole queue is taken."""
    with serve(max_queue=2) as served:
        for count, status in ((3, 400), (2, 200)):
            with client.connection(served.url) as line:
                line.request(
                    "POST", "/v1/completions", json.dumps(ASK | {"n": count}), {"Content-Type": "application/json"}
                )
                answer = line.getresponse()
                assert (answer.status, b"at most 2 texts" in answer.read()) == (status, status == 400)


def test_a_body_without_a_length_is_measured_while_it_comes(served, client):
    """In chunks, none of which says how many follow."""
    with client.connection(served.url) as line:
        chunks = (b"a" * (1 << 16) for _ in range(100))
        line.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            assert line.getresponse().status == 413


def test_other_pages_may_not_ask(served, client):
    """A name that another page made mean this machine is refused, and no origin is allowed to read."""
    for host, status in (("evil.example", 400), ("127.0.0.1", 200), ("LOCALHOST:1234", 200), ("[::1]:80", 200)):
        with client.connection(served.url) as line:
            line.request("GET", "/v1/models", headers={"Host": host, "Origin": "http://evil.example"})
            answer = line.getresponse()
            content = json.loads(answer.read())
            assert ("error" in content and content["error"]["code"] == "unknown_host") == (status == 400)
            assert answer.status == status and answer.getheader("Access-Control-Allow-Origin") is None


def test_the_page_needs_no_other_file(served, client):
    """Nothing but its own address is named in it, and its policy allows its own script and style alone."""
    with client.connection(served.url) as line:
        line.request("GET", "/")
        answer = line.getresponse()
        page, policy = answer.read().decode(), answer.getheader("Content-Security-Policy")
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:)\w+:""", page) and "//" not in policy
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "unsafe" not in policy


def _openai(served, **settings):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, **settings)


def test_the_client_of_openai_works(served):
    """Models, texts, streams with usage, log-probabilities, extensions, and its own kinds of errors."""
    text, made = _library(served.lm)
    with _openai(served) as asked:
        (model,) = asked.models.list().data
        how = dict(model=model.id, prompt=ASK["prompt"], max_tokens=12, seed=5, extra_body={"ignore_eos": True})
        answer = asked.completions.create(**how, logprobs=0)
        assert answer.choices[0].text == text and answer.usage.total_tokens == 20
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(made.log_prob_BN[0, 8:].tolist(), abs=1e-4)
        parts = list(asked.completions.create(**how, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].text for part in parts[:-1]) == text and parts[-1].usage.completion_tokens == 12
        assert asked.models.retrieve(model.id).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            asked.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError) as refused:
            asked.completions.create(model=model.id, prompt="a", temperature=-1)
        assert refused.value.param == "temperature"


def _wait_for(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_refuses_and_clients_that_leave_free_it(serve, client):
    """503 beyond the queue; whoever waits and whoever is served can be killed, and no text is written for them."""
    many = {"prompt": "a", "n": 16, "max_tokens": 60, "ignore_eos": True, "stream": True}
    with serve(max_batch=2, max_queue=20, limits=Limits(max_tokens=60)) as served:
        post, batcher = client.post, served.batcher
        with client.connection(served.url) as first:
            events = client.events(post(first, many))
            next(events)
            with client.connection(served.url) as second:
                second.request("POST", "/v1/completions", json.dumps(many), {"Content-Type": "application/json"})
                answer = second.getresponse()
                assert answer.status == 503 and answer.getheader("Retry-After") == "1"
                assert json.loads(answer.read())["error"]["code"] == "queue_full"
            with pytest.raises(openai.InternalServerError, match="queue is full"), _openai(served) as asked:
                asked.completions.create(model="tiny", prompt="a", n=16)
            with client.connection(served.url) as third:  # waits behind the first
                body = json.dumps({"prompt": "a" * 20, "n": 2, "temperature": 0})
                third.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                _wait_for(lambda: any(text.asked.temperature == 0 for text, _ in list(batcher._waiting)))
            _wait_for(lambda: all(text.asked.temperature > 0 for text, _ in list(batcher._waiting)))
        _wait_for(lambda: batcher.num_active() == batcher.num_waiting() == 0)
        figures = client.get(served.url, "/metrics").decode()
    drawn = float(re.search(r'armd_tokens_total\{kind="generated"\} (\S+)', figures)[1])
    read = float(re.search(r'armd_tokens_total\{kind="prompt"\} (\S+)', figures)[1])
    assert 0 < drawn < 16 * 60 and read <= 16  # the third was never begun
    assert 'armd_requests_total{path="/v1/completions",status="499"}' in figures
    assert 'armd_requests_total{path="/v1/completions",status="503"} 2.0' in figures


def test_figures_are_counted(serve, client):
    """Requests by status, tokens, calls, batches and times, in Prometheus' format; no path adds a series."""
    with serve() as served, client.connection(served.url) as line:
        client.post(line, ASK).read()
        for path in ("/no/such/path", "/v1/models/tiny", "/v1/models/other"):
            line.request("GET", path)
            line.getresponse().read()
        figures = dict(row.rsplit(" ", 1) for row in client.get(served.url, "/metrics").decode().splitlines())
    assert figures['armd_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert figures['armd_requests_total{path="other",status="404"}'] == "1.0"
    for status in (200, 404):
        assert figures[f'armd_requests_total{{path="/v1/models/{{name}}",status="{status}"}}'] == "1.0"
    assert figures['armd_tokens_total{kind="prompt"}'] == "8.0"
    assert figures['armd_tokens_total{kind="generated"}'] == figures["armd_network_calls_total"] == "12.0"
    assert figures["armd_batch_rows_sum"] == figures["armd_batch_rows_count"] == "1.0"
    assert figures["armd_first_token_seconds_count"] == "1.0"
    assert figures['armd_request_seconds_bucket{le="+Inf",path="/v1/completions"}'] == "1.0"
    assert figures["armd_queue_length"] == figures["armd_active_rows"] == "0.0"


def test_a_client_that_half_closes_or_sends_nonsense_harms_nobody(served, post):
    """The server answers the next one."""
    for content in (b"\x00\xff\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b""):
        line = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
        line.connect()
        line.sock.sendall(content)
        line.close()
    assert post(ASK)[0] == 200
