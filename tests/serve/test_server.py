"""A server says what `generate` says, whoever asks at the same time and however; and refuses in one sentence what it cannot."""

import base64
import concurrent.futures
import json
import os
import socket
import time

import numpy as np
import pytest
from client import LIMITS, TEXT, Running, alone, requests, small_model
from hostile import BAD, asked_with

import flax_switch as fs
from flax_switch.ops.kernels.on_disk import first_on_disk
from flax_switch.serving import metrics
from flax_switch.serving.models import Served

WORDS = TEXT.split()
PROMPT = " ".join(WORDS[:6])


@pytest.fixture(scope="module")
def models():
    return {"small": small_model(), "other": small_model(1)}


@pytest.fixture(scope="module")
def running(models):
    with Running(models) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return running.client


def test_32_clients_get_what_generate_says_alone_and_nothing_compiles(client, models):
    asked = [(dict(body, model=name), controls) for name in models for body, controls in requests(32)]
    compiled = metrics.compiled["programs"]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda one: client.texts(**one[0]), asked))
    assert metrics.compiled["programs"] == compiled
    for (body, controls), texts in zip(asked, found, strict=True):
        assert texts == alone(models[body["model"]], body, controls), (body, controls)
    assert len({text for texts in found for text in texts}) > 40, "outputs that differ can be told apart"


def test_several_prompts_are_a_batch_of_generate(client, models):
    prompts = [" ".join(WORDS[i : i + 4]) for i in range(4)]
    controls = dict(do_sample=True, temperature=1.5, top_k=0, num_return_sequences=2, max_new_tokens=6, seed=5)
    expected = models["small"].generate(prompts, **controls).texts
    assert client.texts(model="small", prompt=prompts, temperature=1.5, top_k=0, n=2, max_tokens=6, seed=5) == list(expected)


def test_a_seed_gives_the_same_again_and_is_told(client):
    body = dict(model="small", prompt=PROMPT, temperature=2.0, max_tokens=16)
    first = client.complete(**body)
    again = client.complete(**body, seed=first["seed"])
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in first["choices"]]
    assert len({client.complete(**body)["seed"] for _ in range(3)}) == 3


def test_what_is_streamed_is_the_whole(client):
    for body, _ in requests(12, seed=3):
        whole = client.complete(model="small", **{"seed": 0, **body})
        events = client.events(model="small", **{"seed": 0, **body}, stream_options={"include_usage": True})
        assert events[-1]["usage"] == whole["usage"]
        for choice in whole["choices"]:
            pieces = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
            assert "".join(piece["text"] for piece in pieces) == choice["text"]
            assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [choice["finish_reason"]]


def test_stop_ends_a_text_before_it_and_its_tokens_with_it(client):
    body = dict(model="small", prompt=PROMPT, temperature=1.0, top_k=0, seed=1, max_tokens=16)
    whole = client.texts(**body)[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = client.complete(**body, stop=[stop, "never there"])
    assert stopped["choices"][0]["text"] == whole[: whole.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] < client.complete(**body)["usage"]["completion_tokens"]
    assert "".join(c["text"] for e in client.events(**body, stop=stop) for c in e["choices"]) == whole[: whole.index(stop)]


def test_log_probabilities_are_the_models(client, models):
    model, prompt = models["small"], " ".join(WORDS[:5])
    choice = client.complete(model="small", prompt=prompt, max_tokens=8, logprobs=3, temperature=0)["choices"][0]
    found = choice["logprobs"]
    output = model.generate(prompt, max_new_tokens=8, output_scores=True)
    log_probs = np.asarray(output.step_scores[:, 0], np.float64)
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
    tokens = [t for t in output.sequences[0, 1:].tolist() if t != 1]
    np.testing.assert_allclose(found["token_logprobs"], [row[t] for row, t in zip(log_probs, tokens, strict=False)], atol=1e-4)
    assert "".join(found["tokens"]) == choice["text"]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(tokens))]
    for row, top in zip(log_probs, found["top_logprobs"], strict=False):
        assert sorted(top.values(), reverse=True) == pytest.approx(np.sort(row)[::-1][:3], abs=1e-4)


def test_the_best_of_several_has_the_highest_mean_log_probability(client):
    body = dict(model="small", prompt=PROMPT, temperature=2.0, top_k=0, seed=3, max_tokens=8, logprobs=0)
    every, best = client.complete(**body, n=8), client.complete(**body, n=3, best_of=8)
    # EOS, whose log-probability counts, is not shown: choices that ended without are compared.
    means = {c["text"]: np.mean(c["logprobs"]["token_logprobs"]) for c in every["choices"] if c["finish_reason"] == "length"}
    returned = [choice["text"] for choice in best["choices"] if choice["text"] in means]
    others = means.keys() - set(returned)
    assert len(best["choices"]) == 3 and returned and others
    assert [means[text] for text in returned] == sorted((means[text] for text in returned), reverse=True)
    assert max(means[text] for text in others) < means[returned[-1]]
    assert best["usage"] == every["usage"]


def test_embeddings_are_mean_states_of_length_one_whatever_the_padding(client, models):
    status, answer = client.post("/v1/embeddings", dict(model="small", input=["the cat", PROMPT]))
    assert status == 200
    model = models["small"]
    for text, one in zip(["the cat", PROMPT], answer["data"], strict=True):
        ids = [[*model.vocabulary.encode(text), 1]]
        config = model.config.replace(eval_capacity_factor=100.0)
        mean = np.asarray(
            type(model.model)(config).apply({"params": model.params}, np.array(ids), method="encode").last_hidden_state
        )[0].mean(0)
        np.testing.assert_allclose(one["embedding"], mean / np.linalg.norm(mean), atol=1e-4)
    status, packed = client.post("/v1/embeddings", dict(model="small", input="the cat", encoding_format="base64"))
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4"), answer["data"][0]["embedding"]
    )


def test_routing_names_the_experts_of_every_token(client, models):
    status, answer = client.post("/v1/routing", dict(model="small", input="the cat sat", output="on the mat"))
    assert status == 200
    encoder, decoder = answer["stacks"]
    assert (encoder["stack"], decoder["stack"]) == ("encoder", "decoder")
    assert len(encoder["tokens"]) == len(models["small"].vocabulary.encode("the cat sat")) + 1
    for stack in answer["stacks"]:
        for layer in stack["layers"]:
            assert len(layer["chosen"]) == len(stack["tokens"])
            assert all(0 <= expert < 4 for experts in layer["chosen"] for expert in experts)


def test_models_health_and_metrics(client):
    assert [model["id"] for model in json.loads(client.get("/v1/models")[1])["data"]] == ["small", "other"]
    assert json.loads(client.get("/v1/models/other")[1])["max_source_length"] == LIMITS.max_source_length
    assert client.get("/v1/models/nobody")[0] == 404
    assert client.get("/health") == (200, '{"status": "ok"}')
    before = client.metric('flax_switch_tokens_total{model="small",kind="completion"}')
    client.complete(model="small", prompt="a", max_tokens=5, temperature=0)
    assert before < client.metric('flax_switch_tokens_total{model="small",kind="completion"}') <= before + 5
    assert client.metric("flax_switch_sequences_running") == 0


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_served_is_refused_in_a_sentence(case, client):
    body, status, said = BAD[case]
    found, answer = client.post("/v1/completions", asked_with(body))
    assert (found, said in answer["error"]["message"]) == (status, True), answer
    assert len(answer["error"]["message"]) < 500
    assert answer["error"]["message"].endswith((".", "?"))


def test_odd_unicode_is_a_text_like_others(client, models):
    for prompt in ("", " ", "\ud83d", "é" * 20, "\u202e\x00\x07", "👩‍👩‍👧", "<pad></s><extra_id_0>"):
        raw = json.dumps(dict(model="small", prompt=prompt, max_tokens=4, temperature=0)).encode()
        status, answer = client.post("/v1/completions", raw)
        assert status == 200
        prompt = prompt.replace("\ud83d", "\ufffd")
        assert answer["choices"][0]["text"] == models["small"].generate(prompt, max_new_tokens=4).texts[0]


def test_other_paths_methods_and_kinds_are_refused(client):
    assert client.get("/v1/nothing")[0] == 404
    assert client.get("/v1/completions")[0] == 405
    status, answer = client.post("/v1/chat/completions", dict(messages=[]))
    assert status == 404 and "/v1/completions" in answer["error"]["message"]
    with client.asked("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}.items()) as response:
        assert response.status == 415, "what any page may send across origins"
    status, answer = client.post("/v1/completions", dict(model="small", prompt="a"), Host="evil.example")
    assert status == 400 and "Host" in answer["error"]["message"]
    with client.asked("OPTIONS", "/v1/completions", headers={"Origin": "http://evil.example"}.items()) as response:
        assert not any(name.lower().startswith("access-control") for name, _ in response.getheaders())


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream, running, client, monkeypatch):
    pool = running.server.engine.pools["small", 32]
    slow = pool.decoder.run
    monkeypatch.setattr(pool.decoder, "run", lambda *args: (time.sleep(0.2), slow(*args[:2], 1, *args[3:]))[1])
    body = json.dumps(dict(model="small", prompt="a", max_tokens=16, stream=stream, temperature=2, top_k=0, seed=2)).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: running.server.engine.running)
    started = time.monotonic()
    wait_until(lambda: not running.server.engine.running)
    assert time.monotonic() - started < 1.5, "16 steps would take 3.2 s"


def test_time_queue_and_key_have_limits_of_their_own(models):
    limits = LIMITS.replace(slots=1, queue=1, timeout=1.0)
    with Running({"small": models["small"]}, limits, key="abc") as running:
        client, pool = running.client, running.server.engine.pools["small", 32]
        body, key = dict(prompt="a", max_tokens=16, temperature=0), {"Authorization": "Bearer abc"}
        assert client.post("/v1/completions", body)[0] == 401
        assert client.post("/v1/completions", body, Authorization="Bearer abd")[0] == 401
        assert client.get("/metrics")[0] == 401
        assert client.get("/health")[0] == 200
        assert client.post("/v1/completions", body, **key)[0] == 200
        slow = pool.decoder.run
        pool.decoder.run = lambda *args: (time.sleep(0.3), slow(*args[:2], 1, *args[3:]))[1]
        with concurrent.futures.ThreadPoolExecutor(6) as clients:
            found = list(clients.map(lambda _: client.post("/v1/completions", body, **key), range(6)))
        statuses = sorted(status for status, _ in found)
        assert set(statuses) == {408, 429}, statuses
        assert {answer["error"]["message"] for status, answer in found if status == 408} == {
            "The output was not complete within 1 s; ask for fewer tokens."
        }
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer abc\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(1000)


def test_a_signal_finishes_what_runs_and_refuses_what_waits(models):
    limits = LIMITS.replace(slots=2, queue=8)
    with Running({"small": models["small"]}, limits) as running:
        client, pool = running.client, running.server.engine.pools["small", 32]
        slow = pool.decoder.run
        pool.decoder.run = lambda *args: (time.sleep(0.1), slow(*args[:2], 1, *args[3:]))[1]
        body = dict(prompt="a", max_tokens=16, temperature=2.0, top_k=0, seed=2)
        with concurrent.futures.ThreadPoolExecutor(5) as clients:
            asked = [clients.submit(client.post, "/v1/completions", body) for _ in range(5)]
            wait_until(lambda: (running.server.engine.running, running.server.engine.waiting) == (2, 3))
            running.end()
            found = [one.result() for one in asked]
        assert sorted(status for status, _ in found) == [200, 200, 503, 503, 503]
        running.thread.join(20)
        with pytest.raises(OSError):
            client.get("/health")


def test_a_failure_of_the_device_is_told_and_the_next_request_is_served(running, client, monkeypatch, caplog):
    pool = running.server.engine.pools["other", 32]

    def broken(*args):
        raise RuntimeError("no device")

    body = dict(model="other", prompt="a secret", max_tokens=4, temperature=0)
    with monkeypatch.context() as patch:
        patch.setattr(pool.decoder, "run", broken)
        assert client.post("/v1/completions", body)[0] == 500
    assert client.post("/v1/completions", body)[0] == 200
    assert "no device" in caplog.text
    assert "secret" not in caplog.text, "texts are no matter of the log"


@pytest.mark.slow
def test_experts_on_disk_are_served_and_a_file_that_is_changed_is_told(models, tmp_path, caplog):
    models["small"].save_pretrained(tmp_path / "model", format="flax_switch")
    on_disk = fs.load_pretrained(tmp_path / "model", experts="disk", expert_memory=2 * 2 * 16 * 32 * 4)  # two experts
    body = dict(prompt=PROMPT, max_tokens=8, temperature=0)
    with Running({"small": on_disk}, LIMITS.replace(slots=1, max_source_length=32)) as running:
        client = running.client
        expected = models["small"].generate(PROMPT, max_new_tokens=8).texts
        assert client.texts(**body) == list(expected)
        assert "".join(event["choices"][0]["text"] for event in client.events(**body)) == expected[0]
        said = client.complete(**body, logprobs=2)["choices"][0]
        assert said["text"] == expected[0] and len(said["logprobs"]["token_logprobs"]) > 1
        vector = client.post("/v1/embeddings", dict(input=PROMPT))[1]["data"][0]["embedding"]
        resident = Served("small", models["small"], LIMITS)
        np.testing.assert_allclose(vector, resident.embed(resident.ids_of(PROMPT), 32), rtol=1e-5)
        os.utime(tmp_path / "model/params.safetensors")
        first_on_disk(on_disk.params).cache.clear()
        for path, asked in (("completions", body), ("embeddings", dict(input=PROMPT))):
            caplog.clear()
            status, answer = client.post(f"/v1/{path}", asked)
            assert status == 500 and "log" in answer["error"]["message"] and str(tmp_path) not in str(answer)
            assert "CheckpointError: Expert" in caplog.text or caplog.messages[-1].startswith("Expert"), "it names the expert"
            assert "has changed since the model was opened" in caplog.text
