"""A server under load: `armd serve` on loopback, asked by many clients at once for a bounded time.

    python experiments/benchmarks/serve.py --run=runs/quickstart

Before the load, it measures how long a warm server needs for the first token, and compares that with the time of one
network call. Then the clients ask for texts whose tokens `lm.generate` has drawn before, half of them as a stream, and
every answer is compared. While they do, one client after the other is killed in the middle of its text. It fails if an
answer is wrong or missing, or if the text of a killed client is still written in the end.
"""

import argparse
import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from common import machine, print_json, print_versions

from armd_jax.inference.language_model import LanguageModel
from armd_jax.interop.load import load

PROMPTS = ("", "The file", "The sequence of bytes is", "A function that returns ", "If the list is empty, ")
LONGEST_WAIT = 60.0  # seconds that a client waits for bytes before its request counts as lost


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and the text that answers it."""

    body: dict[str, Any]
    text: str


@dataclasses.dataclass
class Load:
    """What the clients saw. seconds and first: of each answered request; first is known of streams alone."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    refused: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    killed: int = 0


def make_jobs(
    lm: LanguageModel, count: int, longest: int, streams: list[int], temperatures: list[float], batch: int
) -> list[Job]:
    """Requests of several lengths, prompts, numbers of streams and temperatures, and their texts.

    batch: with how many texts at a time those are drawn.
    """
    assert lm.tokenizer is not None
    rng = random.Random(0)
    bodies = []
    for number in range(count):
        body = {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randint(1, longest), "seed": number}
        bodies.append(body | {"streams": rng.choice(streams), "temperature": rng.choice(temperatures)})
    jobs = []
    for alike in streams:
        for greedy in (True, False):
            group = [body for body in bodies if body["streams"] == alike and (body["temperature"] == 0) == greedy]
            for start in range(0, len(group), batch):
                chosen = (group[start : start + batch] * batch)[:batch]
                prompts = [lm.tokenizer.encode(body["prompt"]) for body in chosen]
                made = lm.generate(
                    prompt=prompts,
                    max_new_tokens=[body["max_tokens"] for body in chosen],
                    temperature=[body["temperature"] for body in chosen],
                    seed=[body["seed"] for body in chosen],
                    streams=alike,
                )
                texts = lm.texts(made)
                jobs += [Job(body, text[len(body["prompt"]) :]) for body, text in zip(chosen, texts, strict=True)]
    return jobs


@contextlib.contextmanager
def connection(url: str) -> Iterator[http.client.HTTPConnection]:
    """A connection to the server."""
    client = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=LONGEST_WAIT)
    try:
        yield client
    finally:
        client.close()


def post(client: http.client.HTTPConnection, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    """Sends a request, and returns its answer, whose body has not been read."""
    client.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return client.getresponse()


def get(url: str, path: str) -> bytes:
    """The body of what is at a path."""
    with connection(url) as client:
        client.request("GET", path)
        return client.getresponse().read()


def events(answer: Any) -> Iterator[dict[str, Any]]:
    """The objects of a stream. Raises ValueError if it does not end as it should."""
    for line in answer:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])
    raise ValueError("the stream has no end")


def ask(client: http.client.HTTPConnection, job: Job, streamed: bool, load: Load) -> int:
    """One request, and what came of it. Returns the HTTP status."""
    began, first = time.perf_counter(), None
    answer = post(client, job.body | {"stream": streamed})
    if answer.status != 200:
        content = answer.read()
        if answer.status == 503:
            load.refused += 1
        else:
            load.wrong.append(f"{answer.status}: {content!r:.200}")
        return answer.status
    if streamed:
        text = ""
        for event in events(answer):
            first = first or time.perf_counter() - began
            text += event["choices"][0]["text"]
        answer.read()
    else:
        text = json.loads(answer.read())["choices"][0]["text"]
    load.seconds.append(time.perf_counter() - began)
    if first is not None:
        load.first.append(first)
    if text != job.text:
        load.wrong.append(f"{job.body}: {text!r} and not {job.text!r}")
    return 200


def put_under_load(url: str, jobs: list[Job], clients: int, seconds: float, kill: bool = True) -> Load:
    """Lets so many clients ask, each again and again, until the time is over and all answers are there.

    kill: whether one more client begins a text, breaks the connection, and begins the next one.
    """
    end, load, lock = time.perf_counter() + seconds, Load(), threading.Lock()

    def client(number: int) -> None:
        rng, own = random.Random(number), Load()
        with connection(url) as line:
            while time.perf_counter() < end:
                try:
                    if ask(line, rng.choice(jobs), rng.random() < 0.5, own) == 503:
                        time.sleep(rng.uniform(0.05, 0.2))
                except (OSError, ValueError, http.client.HTTPException) as error:
                    own.lost.append(repr(error))
                    line.close()
        with lock:
            for field in dataclasses.fields(Load):
                setattr(load, field.name, getattr(load, field.name) + getattr(own, field.name))

    def killer() -> None:
        rng, killed = random.Random(-1), 0
        while time.perf_counter() < end:
            with connection(url) as line:
                answer = post(line, rng.choice(jobs).body | {"stream": True})
                answer.read(1)
                killed += answer.status == 200
            time.sleep(0.1)
        with lock:
            load.killed = killed

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    threads += [threading.Thread(target=killer)] * kill
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def generated(url: str) -> float:
    """How many tokens the server has drawn, those for killed clients included."""
    (line,) = [
        row for row in get(url, "/metrics").splitlines() if row.startswith(b'armd_tokens_total{kind="generated"}')
    ]
    return float(line.split()[-1])


def is_free(url: str, seconds: float = 10.0) -> bool:
    """Whether, at some time within these seconds, no text waits and none is written."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        health = json.loads(get(url, "/health"))
        if health["queue"] == health["active"] == 0:
            return True
        time.sleep(0.02)
    return False


def first_token(url: str, lm: LanguageModel, prompt: str, repeats: int) -> dict[str, float]:
    """Medians in seconds: the first token of the server and of the library, and one network call of each; their ratios.

    A call is the mean time between two tokens of the same text. The library is measured after the server, and not in
    turns with it, because its threads would go on to take time from the server.
    """
    assert lm.tokenizer is not None
    texts: dict[str, list[list[float]]] = {"server": [], "library": []}  # when each token came, from the request on
    with connection(url) as client:
        for seed in range(repeats + 2):
            began = time.perf_counter()
            body = {"text": prompt, "max_tokens": 24, "seed": seed, "ignore_eos": True}
            lines = [(line, time.perf_counter() - began) for line in post(client, body, "/api/generate")]
            texts["server"].append([at for line, at in lines if b'"call"' in line])
            time.sleep(0.02)
    how: dict[str, Any] = {"prompt": lm.tokenizer.encode(prompt), "max_new_tokens": 24, "stop_at_end": False}
    for seed in range(repeats + 2):
        began = time.perf_counter()
        made = lm.generate_stream(**how, seed=seed)
        texts["library"].append([time.perf_counter() - began for _ in made])
    found = {}
    for who, all_times in texts.items():
        calls = [(times[-1] - times[0]) / (len(times) - 1) for times in all_times[2:]]
        found[f"{who}_first"] = statistics.median(times[0] for times in all_times[2:])
        found[f"{who}_call"] = statistics.median(calls)
        ratios = [times[0] / call for times, call in zip(all_times[2:], calls, strict=True)]
        found[f"{who}_ratio"] = statistics.median(ratios)
    return found


@contextlib.contextmanager
def serve(run: pathlib.Path, *arguments: str) -> Iterator[str]:
    """The address of `armd serve`, which is ended by SIGTERM and then has to have exit code 0."""
    command = [sys.executable, "-m", "armd_jax", "serve", f"--run={run}", "--port=0", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                sys.exit("error: armd serve did not start")
            yield json.loads(line)["url"]
        finally:
            server.terminate()
        if server.wait(timeout=LONGEST_WAIT) != 0:
            sys.exit(f"error: armd serve ended with exit code {server.returncode}")


def percentiles(values: list[float]) -> dict[str, float]:
    """50, 90 and 99%, and the largest."""
    ordered = sorted(values)
    return {f"p{share}": ordered[min(len(ordered) * share // 100, len(ordered) - 1)] for share in (50, 90, 99, 100)}


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="a training run or an export")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument(
        "--max-queue", type=int, default=32, help="below the number of clients, so that some are refused"
    )
    parser.add_argument("--tokens", type=int, default=64, help="the most tokens of a text")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=20, help="of the measurement of the first token")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    lm = load(args.run)
    jobs = make_jobs(lm, 4 * args.clients, args.tokens, args.streams, [0.0, 0.7, 1.0], args.max_batch)
    facts = machine(hugging_face=False)
    with serve(args.run, f"--max-batch={args.max_batch}", f"--max-queue={args.max_queue}") as url:
        first = {
            name: first_token(url, lm, prompt, args.repeats) for name, prompt in (("none", ""), ("short", PROMPTS[2]))
        }
        # The programs of the load, which a server compiles when they are first asked for.
        put_under_load(url, jobs, args.clients, 10.0, kill=False)
        before, began = generated(url), time.perf_counter()
        found = put_under_load(url, jobs, args.clients, args.seconds)
        rate = (generated(url) - before) / (time.perf_counter() - began)
        free, figures = is_free(url), get(url, "/metrics").decode()
    result = {
        "answers": len(found.seconds),
        "refused": found.refused,
        "wrong": len(found.wrong),
        "lost": len(found.lost),
        "killed": found.killed,
        "free_in_the_end": free,
        "tokens_per_second": rate,
        "seconds": percentiles(found.seconds),
        "first_token_under_load": percentiles(found.first),
        "first_token": first,
    }
    if args.json:
        print_json(facts | result)
    else:
        print_versions(facts)
        _print(result, args)
    for problem in [*found.wrong[:5], *found.lost[:5]]:
        print(problem, file=sys.stderr)
    if found.wrong or found.lost or not free or "armd_active_rows 0.0" not in figures:
        sys.exit(1)


def _print(result: dict[str, Any], args: argparse.Namespace) -> None:
    print(f"\n{args.clients} clients for {args.seconds:.0f} s; batches of {args.max_batch}, queue of {args.max_queue}")
    counts = ("answers", "refused", "wrong", "lost", "killed", "free_in_the_end")
    print(", ".join(f"{name.replace('_', ' ')}: {result[name]}" for name in counts))
    print(f"tokens per second: {result['tokens_per_second']:.0f}")
    for name in ("seconds", "first_token_under_load"):
        print(f"{name.replace('_', ' ')}: " + ", ".join(f"{p} {value:.3f} s" for p, value in result[name].items()))
    for name, row in result["first_token"].items():
        print(
            f"first token of a warm server, prompt: {name}: {1000 * row['server_first']:.1f} ms,"
            f" {row['server_ratio']:.2f} times one of its network calls ({1000 * row['server_call']:.1f} ms);"
            f" the library alone: {1000 * row['library_first']:.1f} ms, {row['library_ratio']:.2f} times"
        )


if __name__ == "__main__":
    main()
