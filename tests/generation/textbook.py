"""Greedy and beam search as a textbook has them, for one source, in plain Python: what the compiled searches are held to.

`log_probs(prefixes)` gives the next token's log-probabilities after each of some prefixes, [len(prefixes), V].
"""

import numpy as np


def greedy_search(log_probs, start, *, max_new_tokens, eos):
    """The most probable token each time, until EOS."""
    tokens = tuple(start)
    for _ in range(max_new_tokens):
        tokens += (int(np.argmax(log_probs([tokens])[0])),)
        if tokens[-1] in eos:
            break
    return tokens


def beam_search(
    log_probs, start, *, num_beams, max_new_tokens, eos, length_penalty=1.0, early_stopping=False, noise=None, divisor=None
):
    """[(tokens, score), ...], `num_beams` of them, best first.

    A score is the sum of log-probabilities over length ** length_penalty, or over `divisor(length)`. The search looks at the
    2 * num_beams best continuations of a step (more where there are several EOS tokens). Of the first num_beams of them, those that
    end are finished; of all, the best that do not end go on. It stops with num_beams finished ones, at once (early_stopping=True),
    or when the best running one would not beat the worst of them if it ended now (False), or at its best future length ("never").
    `noise(step)` [num_beams, V] is added where continuations are compared, which makes the choice a draw.
    """
    divisor = divisor or (lambda length: float(length) ** length_penalty)
    width = max(2, 1 + len(eos)) * num_beams
    running, finished = [(tuple(start), 0.0)], []
    for step in range(1, max_new_tokens + 1):
        table = np.asarray(log_probs([tokens for tokens, _ in running]))
        drawn = np.zeros((num_beams, table.shape[1])) if noise is None else noise(step)
        candidates = []
        for beam, (tokens, score) in enumerate(running):
            for token in range(table.shape[1]):
                total = score + table[beam, token]
                candidates.append((-(total + drawn[beam, token]), beam, token, tokens + (token,), total))
        candidates = [(tokens, total) for *_, tokens, total in sorted(candidates)[:width]]
        last = step == max_new_tokens
        ended = [(tokens, total / divisor(step)) for tokens, total in candidates[:num_beams] if last or tokens[-1] in eos]
        finished = sorted(finished + ended, key=lambda beam: -beam[1])[:num_beams]
        running = sorted((beam for beam in candidates if beam[0][-1] not in eos), key=lambda beam: -beam[1])[:num_beams]
        if len(finished) < num_beams:
            continue
        if early_stopping is True:
            break
        hopeful = early_stopping == "never" and divisor(2) > divisor(1)  # longer is divided by more, so negative scores rise
        if running[0][1] / divisor(max_new_tokens if hopeful else step) <= finished[-1][1]:
            break
    return finished


def diverse_beam_search(
    log_probs,
    start,
    *,
    num_beams,
    num_beam_groups,
    diversity_penalty,
    max_new_tokens,
    eos,
    pad,
    length_penalty=1.0,
    early_stopping=False,
):  # fmt: skip
    """[(tokens, score), ...], `num_beams` of them, best first: groups of beams (1610.02424), with Hugging Face's ends.

    In each step the groups search one after the other. A token costs `diversity_penalty` for each beam of a former group that has
    just been continued by it; a group that is over says `pad`. A group is over when it has as many finished beams as a group has
    beams and the best continuation of this step, ended or not, is no better than the worst of them (at its present length, or with
    "never" and a penalty above 0 at the greatest), or with early_stopping=True at once. At the end running beams count as finished.
    """
    size, width = num_beams // num_beam_groups, max(2, 1 + len(eos)) * num_beams // num_beam_groups
    groups = [dict(running=[(tuple(start), 0.0)], finished=[], over=False) for _ in range(num_beam_groups)]
    for step in range(1, max_new_tokens + 1):
        said = []
        for group in groups:
            if group["over"]:
                said += [pad] * size
                continue
            table = np.array(log_probs([tokens for tokens, _ in group["running"]]), np.float64)
            for token in said:
                table[:, token] -= diversity_penalty
            candidates = [
                (tokens + (token,), score + table[beam, token])
                for beam, (tokens, score) in enumerate(group["running"])
                for token in range(table.shape[1])
            ]
            candidates = sorted(candidates, key=lambda beam: -beam[1])[:width]
            ended = [(tokens, score / step**length_penalty) for tokens, score in candidates[:size] if tokens[-1] in eos]
            group["finished"] = sorted(group["finished"] + ended, key=lambda beam: -beam[1])[:size]
            group["running"] = [beam for beam in candidates if beam[0][-1] not in eos][:size]
            said += [tokens[-1] for tokens, _ in group["running"]]
            if len(group["finished"]) == size:
                greatest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else step
                hope = candidates[0][1] / greatest**length_penalty
                group["over"] = early_stopping is True or group["finished"][-1][1] >= hope
    found = []
    for group in groups:
        running = [] if group["over"] else [(tokens, score / max_new_tokens**length_penalty) for tokens, score in group["running"]]
        found += sorted(group["finished"] + running, key=lambda beam: -beam[1])[:size]
    return sorted(found, key=lambda beam: -beam[1])


def contrastive_search(run, start, *, penalty_alpha, top_k, max_new_tokens, eos):
    """The tokens of contrastive search (2202.06417). `run(tokens)`: log-probabilities of the next one, and states of them all."""
    tokens = tuple(start)
    for _ in range(max_new_tokens):
        log_probs, _ = run(tokens)

        def value(token, tokens=tokens, log_probs=log_probs):
            *former, new = run((*tokens, token))[1]
            alike = [new @ state / np.linalg.norm(new) / np.linalg.norm(state) for state in former]
            return (1 - penalty_alpha) * np.exp(log_probs[token]) - penalty_alpha * max(alike)

        tokens += (max(np.argsort(-log_probs, kind="stable")[:top_k].tolist(), key=value),)
        if tokens[-1] in eos:
            break
    return tokens
