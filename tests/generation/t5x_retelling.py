"""T5X's beam search told again, one source at a time, in plain Python: what the compiled one is held to.

Told from `beam_search` in google-research/t5x's `t5x/decoding.py`, whose arithmetic in float32 decides ties and is kept. A row
stops by its own condition here, as in a batch of one there; T5X goes on until all rows of a batch may stop.
"""

from typing import NamedTuple

import numpy as np

IMPOSSIBLE = np.float32(-1e7)  # added to scores, in float32: what is told apart by less than one is then a tie


class Path(NamedTuple):
    """Tokens from the start token on, and what they are ranked by; whether they are a sequence that ended."""

    tokens: tuple[int, ...]
    score: np.float32
    ended: bool = False


def penalty(length, alpha):
    """What a score of some length is divided by."""
    return np.power(np.float32((5.0 + length) / 6.0), np.float32(alpha))


def best_last(paths, count):
    """The best paths, the best of them last; of equals, earlier ones are taken first, so that they come out the other way round."""
    return sorted(paths, key=lambda path: -path.score)[:count][::-1]


def candidates(live, log_probs_of, count):
    """The best continuations of all live paths by one token, the best first; of equals, those of earlier paths and lower ids."""
    rows = np.asarray(log_probs_of([path.tokens for path in live]), np.float32)
    totals = rows + np.array([path.score for path in live], np.float32)[:, None]
    order = np.argsort(-totals, axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(order, totals.shape), strict=True)
    return [Path((*live[i].tokens, int(token)), totals[i, token]) for i, token in places]


def forced(live, token, count):
    """What stands for candidates inside a prefix: all the same sequence, of which one is alive."""
    scores = [np.float32(0.0)] + [IMPOSSIBLE] * (count - 1)
    return [Path((*live[0].tokens, token), score) for score in scores]


def settled(live, finished, longest, alpha):
    """Whether to stop: no live path can still beat the worst finished one, or no live path is alive.

    The length at which a live path is judged is one more than any path's.
    """
    divisor = penalty(longest + 1, alpha)
    hope = live[-1].score / divisor
    worst = min(path.score for path in finished)
    beaten = all((worst if path.ended else IMPOSSIBLE) > hope for path in finished)
    return beaten or hope < IMPOSSIBLE / divisor


def beam_search(log_probs_of, prefix, *, num_beams, max_new_tokens, eos, alpha=0.6):
    """[(tokens, score), ...], `num_beams` of them, best first.

    `log_probs_of(prefixes)` gives the next token's log-probabilities after each of some prefixes, [len(prefixes), V]. A prefix
    begins with the start token, which no length counts; its other tokens count. Where fewer than num_beams sequences ended, what
    fills their places has no tokens and the score -1e7; where none did, live paths come back, with their summed log-probabilities.
    A path that ended may be continued where there is no other: such a sequence, of a score near -1e7, holds EOS twice.
    """
    start, *prompt = prefix
    longest = len(prompt) + max_new_tokens
    live = [Path((start,), np.float32(0.0))] + [Path((start,), IMPOSSIBLE)] * (num_beams - 1)
    finished = [Path((), IMPOSSIBLE)] * num_beams
    for length in range(1, longest + 1):
        if length > 1 and settled(live, finished, longest, alpha):
            break
        width = 2 * num_beams
        found = forced(live, prompt[length - 1], width) if length <= len(prompt) else candidates(live, log_probs_of, width)
        ends = [path.tokens[-1] == eos for path in found]
        marked = [path._replace(score=path.score + IMPOSSIBLE) if end else path for path, end in zip(found, ends, strict=True)]
        live = best_last(marked, num_beams)
        divisor = penalty(length, alpha)
        scored = [Path(path.tokens, path.score / divisor, True) for path, end in zip(found, ends, strict=True) if end]
        finished = best_last(finished + scored, num_beams)  # what goes on is never better than a place without a sequence
    chosen = finished if any(path.ended for path in finished) else live
    return [(path.tokens, float(path.score)) for path in reversed(chosen)]
