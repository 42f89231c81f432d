"""Sampled acceptance: exact by enumeration, equal to plain sampling token by token, and in frequency."""

import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon.core.accept import Accepted, accept_sampled
from gorgon.core.sampling import History, Randomness, Sampling, choose, probabilities, process
from gorgon.core.tree import DraftTree
from gorgon.errors import ModelError
from tests.unit.test_accept import accepted as accept_greedy
from tests.unit.test_tree import trees


class Script:
    """A backbone: the logits are a fixed function of the whole context, some of them minus infinity."""

    def __init__(self, vocab, seed, scale=2.0):
        self.vocab, self.seed, self.scale, self.known = vocab, seed, scale, {}

    def __call__(self, context):
        key = tuple(context)
        if key not in self.known:
            number = self.seed
            for token in key:
                number = (number * 31 + token + 1) % (2**31 - 1)
            generator = torch.Generator().manual_seed(number)
            logits_V = torch.randn(self.vocab, generator=generator) * self.scale
            if number % 5 == 0:
                logits_V[number % self.vocab] = float("-inf")
            self.known[key] = logits_V
        return self.known[key]


class Fixed(Randomness):
    """Chosen numbers in place of drawn ones; later positions are of no interest."""

    def __init__(self, numbers):
        super().__init__(0)
        self.numbers = numbers

    def uniform(self, position):
        return self.numbers[position] if position < len(self.numbers) else 0.5


def plain(model, prompt, length, sampling, randomness):
    """Ancestral sampling, one token at a time."""
    output = []
    for position in range(length):
        history = History(prompt, output)
        output.append(choose(model(prompt + output), sampling, randomness, position, history))
    return output


def by_trees(model, prompt, length, sampling, randomness, draft, accept=accept_sampled):
    """The same through trees: `draft(context)` gives each step's tree and the tokens on it, the root's left out."""
    output = [choose(model(prompt), sampling, randomness, 0, History(prompt))]
    while len(output) < length:
        tree, drafted = draft(prompt + output)
        tokens = [output[-1], *drafted]
        context = []
        for node, parent in enumerate(tree.parents):
            context.append(prompt + output if parent < 0 else context[parent] + [tokens[node]])
        logits_NV = torch.stack([model(c) for c in context])
        accepted = accept(
            tokens, tree.parents, logits_NV, sampling, randomness, len(output), History(prompt, output)
        )  # fmt: skip
        output += [tokens[n] for n in accepted.nodes[1:]] + [accepted.next_token]
    return output[:length]


def guesses(vocab, seed, tree):
    """Drafts that are a fixed function of the context, right now and then."""

    def draft(context):
        generator = torch.Generator().manual_seed(seed + sum((i + 1) * t for i, t in enumerate(context)))
        return tree, torch.randint(0, vocab, (tree.nodes - 1,), generator=generator).tolist()

    return draft


TREES = [
    DraftTree.of([(0,), (1,), (2,)], ngram=2),
    DraftTree.of([(0,), (0, 0), (1,), (1, 0), (1, 0, 0)], ngram=3),
]
OPTIONS = {
    "temperature": Sampling(temperature=0.8),
    "filters": Sampling(temperature=1.2, top_k=3, top_p=0.9, min_p=0.05),
    "penalties": Sampling(
        temperature=0.7, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=-0.3, logit_bias={2: 0.7}
    ),
    "greedy": Sampling(),
    "greedy with penalties": Sampling(repetition_penalty=1.5, frequency_penalty=0.4, logit_bias={0: 0.5}),
}


# exact, by enumeration


@pytest.mark.parametrize("options", ["temperature", "filters", "penalties"])
def test_the_joint_distribution_is_exactly_that_of_ancestral_sampling(options):
    """The unit cube of the three positions' numbers, cut at every border of every context's cumulative distribution.

    Inside a cell no comparison of a number with a distribution can change, so the outcome is constant there, whatever
    the rule does with it, and one evaluation times the cell's volume integrates exactly.
    """
    vocab, length, prompt, sampling = 4, 3, [1, 0], OPTIONS[options]
    model = Script(vocab, seed=11)
    cuts = [{0.0, 1.0} for _ in range(length)]
    ancestral = {(): 1.0}
    for position in range(length):
        longer = {}
        for context in product(range(vocab), repeat=position):
            output = list(context)
            p_V = probabilities(process(model(prompt + output), sampling, History(prompt, output)))
            cuts[position].update(float(c) for c in p_V.cumsum(0)[:-1])
            for token, p in enumerate(p_V.tolist()):
                longer[(*context, token)] = ancestral[context] * p
        ancestral = longer
    borders = [sorted(c) for c in cuts]
    cells = [[(a + b) / 2 for a, b in pairwise(row) if b - a > 1e-12] for row in borders]
    widths = [[b - a for a, b in pairwise(row) if b - a > 1e-12] for row in borders]
    for tree in TREES:
        draft = guesses(vocab, 5, tree)
        measured = dict.fromkeys(ancestral, 0.0)
        for numbers, sizes in zip(product(*cells), product(*widths), strict=True):
            output = by_trees(model, prompt, length, sampling, Fixed(numbers), draft)
            measured[tuple(output)] += math.prod(sizes)
        assert all(abs(measured[x] - ancestral[x]) < 1e-9 for x in ancestral)


# the same tokens as plain sampling


@settings(max_examples=60)
@given(trees(max_rank=3), st.sampled_from(sorted(OPTIONS)), st.integers(0, 2**20), st.data())
def test_any_tree_gives_the_tokens_of_plain_sampling_with_the_same_seed(tree, options, seed, data):
    model, randomness, prompt = Script(3, seed), Randomness(seed), [2, 0, 1]
    drafted = data.draw(st.lists(st.integers(0, 2), min_size=tree.nodes - 1, max_size=tree.nodes - 1))
    sampling = OPTIONS[options]
    expected = plain(model, prompt, 14, sampling, randomness)
    assert by_trees(model, prompt, 14, sampling, randomness, lambda _: (tree, drafted)) == expected


@settings(max_examples=60)
@given(trees(max_rank=3), st.integers(0, 2**20), st.data())
def test_at_temperature_0_it_is_greedy_acceptance(tree, seed, data):
    model = Script(3, seed)
    tokens = data.draw(st.lists(st.integers(0, 2), min_size=tree.nodes, max_size=tree.nodes))
    context = []
    for node, parent in enumerate(tree.parents):
        context.append([tokens[0]] if parent < 0 else context[parent] + [tokens[node]])
    logits_NV = torch.stack([model(c) for c in context])
    nodes, next_token = accept_greedy(tokens, logits_NV.argmax(-1).tolist(), tree.parents)
    assert accept_sampled(tokens, tree.parents, logits_NV, Sampling()) == Accepted(nodes, next_token)


def test_with_right_drafts_every_step_takes_the_whole_chain():
    model, randomness, sampling = Script(5, 3), Randomness(9), OPTIONS["penalties"]
    expected = plain(model, [1], 13, sampling, randomness)
    steps = []

    def oracle(context):
        steps.append(len(context))
        known = (expected + [0] * 4)[len(context) - 1 :]
        return DraftTree.chain(3), known[:3]

    assert by_trees(model, [1], 13, sampling, randomness, oracle) == expected
    assert len(steps) == 3  # one token from the prompt, then four a step


def test_of_two_children_with_the_same_token_the_one_that_leads_further_is_taken():
    logits_NV = torch.full((4, 4), -20.0)
    logits_NV[0, 1] = logits_NV[1, 2] = logits_NV[2, 2] = logits_NV[3, 3] = 20.0
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        accepted = accept_sampled([0, 1, 1, 2], [-1, 0, 0, 2], logits_NV, sampling, Randomness(0))
        assert accepted == Accepted([0, 2, 3], 3)
        accepted = accept_sampled([0, 1, 1, 2], [-1, 0, 0, 1], logits_NV, sampling, Randomness(0))
        assert accepted == Accepted([0, 1, 3], 3)
        accepted = accept_sampled([0, 1, 1, 3], [-1, 0, 0, 1], logits_NV, sampling, Randomness(0))
        assert accepted == Accepted([0, 1], 2)


def test_a_history_given_is_not_changed_and_holds_for_the_path():
    sampling, history = Sampling(presence_penalty=2.0), History([0], [0])
    logits_NV = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [9.0, 0.0, 0.0]])
    for _ in range(2):  # after 1 is taken, its penalty leaves 2 as the choice
        accepted = accept_sampled([0, 1, 1], [-1, 0, 1], logits_NV, sampling, history=history)
        assert accepted == Accepted([0, 1], 2)


def test_only_rows_on_the_path_are_read():
    logits_NV = torch.full((4, 3), math.nan)
    logits_NV[0] = torch.tensor([0.0, 50.0, 0.0])
    logits_NV[2] = torch.tensor([50.0, 0.0, 0.0])
    tokens, parents = [0, 2, 1, 1], [-1, 0, 0, 1]
    assert accept_sampled(tokens, parents, logits_NV, Sampling(temperature=1.0), Randomness(1)) == Accepted([0, 2], 0)
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        with pytest.raises(ModelError, match="not finite"):
            accept_sampled([0, 1], [-1, 0], logits_NV[:2], sampling, Randomness(1))


# in frequency


def accept_by_the_drafts_probability(tokens, parents, logits_NV, sampling, randomness, position, history):
    """A wrong rule, easily written: take a draft with its probability, else sample as if nothing had happened."""
    nodes = [0]
    while True:
        processed_V = process(logits_NV[nodes[-1]], sampling, history)
        children = [n for n in range(len(tokens)) if parents[n] == nodes[-1]]
        number = Randomness(randomness.seed, stream=99).uniform(position)
        right = [n for n in children[:1] if number < float(probabilities(processed_V)[tokens[n]])]
        if not right:
            return Accepted(nodes, choose(logits_NV[nodes[-1]], sampling, randomness, position, history))
        nodes += right
        position += 1


def p_value(counts, expected):
    """Of Pearson's chi-square test; cells that cannot occur must be empty."""
    assert float(counts[expected == 0].sum()) == 0
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return float(torch.special.gammaincc((possible.sum() - 1).double() / 2, statistic.double() / 2))


@pytest.mark.parametrize("options", ["temperature", "filters"])
def test_frequencies_agree_with_plain_sampling_and_a_wrong_rule_is_found_out(options):
    vocab, prompt, sampling, trials = 4, [1], OPTIONS[options], 1500
    model, tree = Script(vocab, 21, scale=0.7), DraftTree.of([(0,), (1,), (0, 0)])
    draft = guesses(vocab, 2, tree)
    expected = torch.zeros(vocab, vocab, dtype=torch.float64)
    for first in range(vocab):
        p_V = probabilities(process(model(prompt), sampling))
        expected[first] = p_V[first] * probabilities(process(model([*prompt, first]), sampling))

    def counts(sample, first_seed):
        table = torch.zeros(vocab, vocab, dtype=torch.float64)
        for seed in range(first_seed, first_seed + trials):
            one, two = sample(Randomness(seed))
            table[one, two] += 1
        return table

    plainly = counts(lambda r: plain(model, prompt, 2, sampling, r), 0)
    sampled = counts(lambda r: by_trees(model, prompt, 2, sampling, r, draft), trials)
    wrongly = counts(
        lambda r: by_trees(model, prompt, 2, sampling, r, draft, accept_by_the_drafts_probability), trials
    )  # fmt: skip
    assert p_value(plainly, expected * trials) > 0.001
    assert p_value(sampled, expected * trials) > 0.001
    assert p_value(wrongly, expected * trials) < 1e-9
    together = plainly + sampled  # two samples against each other: each cell's share is half of both
    assert p_value(torch.cat((plainly, sampled)), torch.cat((together, together)) / 2) > 0.001


# constraints


class Sums:
    """Allows a token when the sum of all so far, and of it, is no multiple of three; remembers what it was asked."""

    def __init__(self, total=0):
        self.total, self.asked = total, 0

    def mask(self, logits_V):
        self.asked += 1
        allowed = (torch.arange(len(logits_V)) + self.total) % 3 != 0
        return torch.where(allowed, logits_V, float("-inf"))

    def advance(self, token):
        self.total += token


@settings(max_examples=60)
@given(trees(max_rank=3), st.sampled_from(sorted(OPTIONS)), st.integers(0, 2**20), st.data())
def test_a_constrained_walk_is_plain_constrained_sampling(tree, options, seed, data):
    vocab, sampling, prompt = 8, OPTIONS[options], [1, 2]
    model, randomness = Script(vocab, seed), Randomness(seed)
    plainly, expected = Sums(), []
    for position in range(tree.nodes + 1):
        history = History(prompt, expected)
        expected.append(choose(model(prompt + expected), sampling, randomness, position, history, plainly))
    root, rest = expected[0], expected[1:]
    right = data.draw(st.integers(0, tree.nodes - 1))  # drafts on the way to this node are what will be chosen
    tokens, context, depths = [root], [[*prompt, root]], [0]
    for node in range(1, tree.nodes):
        parent = tree.parents[node]
        depths.append(depths[parent] + 1)
        tokens.append(rest[depths[node] - 1] if node <= right else (root + node) % vocab)
        context.append([*context[parent], tokens[node]])
    logits_NV = torch.stack([model(c) for c in context])
    walking = Sums(root)
    walked = accept_sampled(
        tokens, tree.parents, logits_NV, sampling, randomness, 1, History(prompt, [root]), walking
    )  # fmt: skip
    output = [tokens[n] for n in walked.nodes[1:]] + [walked.next_token]
    assert output == rest[: len(output)]
    assert walking.total == root + sum(output)  # followed to the next step's root
    assert walking.asked == len(output)  # and nowhere else
