"""Requests that cannot be served: a body, the status that it gets, and what the sentence says."""

BAD = {
    "no JSON": (b"{", 400, "not JSON"),
    "no object": (b"[1]", 400, "must be a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "UTF-8"),
    "deep": (b'{"prompt": ' + b"[" * 19_000, 400, "deeply"),
    "as deep as some Pythons follow": (b'{"model": "small", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400, ""),
    "twice": (b'{"prompt": "a", "prompt": "b", "model": "small"}', 400, "twice"),
    "huge": (b" " * 30_000, 413, "20000"),
    "no prompt": (b'{"model": "small"}', 400, "prompt"),
    "a number": (dict(prompt=3), 400, "prompt"),
    "mixed": (dict(prompt=["a", 3]), 400, "prompt"),
    "empty list": (dict(prompt=[]), 400, "empty"),
    "long": (dict(prompt="the cat " * 100), 400, "takes 48"),
    "very long": (dict(prompt="a" * 10_000), 400, "characters"),
    "bad ids": (dict(prompt=[5, 64]), 400, "no id of the vocabulary"),
    "negative ids": (dict(prompt=[-1]), 400, "no id of the vocabulary"),
    "huge ids": (dict(prompt=[10**400]), 400, "no id of the vocabulary"),
    "too many tokens": (dict(max_tokens=17), 400, "at most 16"),
    "no tokens": (dict(max_tokens=0), 400, "max_tokens"),
    "tokens as text": (dict(max_tokens="5"), 400, "max_tokens"),
    "true as a number": (dict(max_tokens=True), 400, "max_tokens"),
    "cold": (dict(temperature=-1), 400, "temperature"),
    "NaN": (b'{"model": "small", "prompt": "a", "temperature": NaN}', 400, "temperature"),
    "infinite": (b'{"model": "small", "prompt": "a", "temperature": 1e999}', 400, "temperature"),
    "top_p": (dict(top_p=0), 400, "top_p"),
    "top_k": (dict(top_k=10**9), 400, "top_k"),
    "seed": (dict(seed=-1), 400, "seed"),
    "many": (dict(n=9), 400, "may have 8"),
    "more than all": (dict(n=4, best_of=3, temperature=1), 400, "best_of"),
    "greedy samples": (dict(n=2, temperature=0), 400, "temperature 0"),
    "stops": (dict(stop=[""]), 400, "stop"),
    "echo": (dict(echo=True), 400, "echo is not served"),
    "suffix": (dict(suffix="b"), 400, "extra_id_0"),
    "beams": (dict(num_beams=4), 400, "beams are not served"),
    "unknown": (dict(max_token=4), 400, "max_tokens"),
    "another model": (dict(model="smal"), 404, "small"),
    "model of a wrong type": (dict(model=["small"]), 400, "model"),
    "stream": (dict(stream="yes"), 400, "stream"),
}  # fmt: skip


def asked_with(body):
    """The body of a request that would be served but for this."""
    return body if isinstance(body, bytes) else {"model": "small", "prompt": "a", **body}
