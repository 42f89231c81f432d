"""Typical acceptance against the paper's rule, written out path by path."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.accept import Accepted, accept_typical
from gorgon.core.sampling import History, Randomness, Sampling, choose, probabilities, process
from gorgon.errors import ModelError
from tests.unit.test_accept_sampled import Script
from tests.unit.test_tree import trees


def typical(**options):
    return Sampling(acceptance="typical", **{"temperature": 1.0, **options})


def literally(tokens, parents, logits_NV, sampling, randomness, position, prompt, output):
    """arXiv:2401.10774, section 2.3.1: of all candidates and their prefixes that pass, the longest, then likeliest."""
    best = None
    for node in range(len(tokens)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        likelihood, passed = 0.0, True
        for before, after in pairwise(path):
            written = [tokens[n] for n in path[1 : path.index(before) + 1]]
            history = History(prompt, output + written)
            p = probabilities(process(logits_NV[before], sampling, history)).tolist()
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            passed = passed and p[tokens[after]] > min(sampling.epsilon, sampling.delta * math.exp(-entropy))
            likelihood += math.log(p[tokens[after]]) if p[tokens[after]] > 0 else -math.inf
        if passed and (best is None or (len(path), likelihood) > best[:2]):
            best = (len(path), likelihood, path)
    path = best[2]
    history = History(prompt, output + [tokens[n] for n in path[1:]])
    token = choose(logits_NV[path[-1]], sampling, randomness, position + len(path) - 1, history)
    return Accepted(path, token)


SETTINGS = [
    typical(),
    typical(temperature=0.5, epsilon=0.3, delta=0.6),
    typical(epsilon=0.01, delta=0.05, top_k=3),
    typical(temperature=0.8, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
]


@settings(max_examples=80)
@given(trees(max_rank=3), st.sampled_from(SETTINGS), st.integers(0, 2**20), st.data())
def test_it_is_the_papers_rule(tree, sampling, seed, data):
    model, prompt = Script(4, seed), [2, 0]
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=tree.nodes, max_size=tree.nodes))
    context = []
    for node, parent in enumerate(tree.parents):
        context.append([*prompt, tokens[0]] if parent < 0 else context[parent] + [tokens[node]])
    logits_NV = torch.stack([model(c) for c in context])
    randomness, history = Randomness(seed), History(prompt, tokens[:1])
    expected = literally(tokens, tree.parents, logits_NV, sampling, randomness, 1, prompt, tokens[:1])
    for _ in range(2):  # the second time shows that the history is not changed
        assert accept_typical(tokens, tree.parents, logits_NV, sampling, randomness, 1, history) == expected


def test_thresholds_at_known_distributions():
    half_V = torch.tensor([0.5, 0.5, 0.0]).log()  # entropy log 2: the threshold is min(epsilon, delta / 2)
    rows_NV = torch.stack((half_V, half_V))
    for options, nodes in [
        ({"epsilon": 0.49, "delta": 1.0}, [0, 1]),
        ({"epsilon": 0.51, "delta": 1.0}, [0]),  # p = threshold = 0.5 is not more
        ({"epsilon": 1.0, "delta": 0.99}, [0, 1]),
    ]:
        assert accept_typical([0, 1], [-1, 0], rows_NV, typical(**options), Randomness(0)).nodes == nodes
    assert accept_typical([0, 2], [-1, 0], rows_NV, typical(), Randomness(0)).nodes == [0]  # probability 0


def test_of_equally_long_paths_the_likelier_wins_and_the_earlier_in_a_tie():
    row_V = torch.tensor([0.2, 0.5, 0.3]).log()
    options = typical(epsilon=0.1)
    assert accept_typical([0, 2, 1], [-1, 0, 0], row_V.expand(3, 3), options, Randomness(0)).nodes == [0, 2]
    assert accept_typical([0, 1, 1], [-1, 0, 0], row_V.expand(3, 3), options, Randomness(0)).nodes == [0, 1]
    assert accept_typical([0, 1, 0, 0], [-1, 0, 0, 2], row_V.expand(4, 3), options, Randomness(0)).nodes == [0, 2, 3]


def test_it_is_lossy():
    """A draft of probability 0.4 is always taken: not what sampling does."""
    row_V = torch.tensor([0.4, 0.6]).log()
    taken = [accept_typical([1, 0], [-1, 0], row_V.expand(2, 2), typical(), Randomness(s)).nodes for s in range(50)]
    assert taken == [[0, 1]] * 50


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="not finite"):
        accept_typical([0, 1], [-1, 0], torch.full((2, 3), math.nan), typical(), Randomness(0))
