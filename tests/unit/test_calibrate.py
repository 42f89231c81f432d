"""Replaying recorded texts predicts what the engine really does, step by step, for every kind of drafter."""

from collections import Counter

import pytest
import torch

from gorgon.config import TuneConfig
from gorgon.core.heads import MedusaHeads
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.rank_stats import best_tree, count_prefixes, replay
from gorgon.core.tree import DraftTree
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.calibrate import Recording, count_acceptance, record, replay_drafter
from gorgon.decode.candidates import Candidate
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.finalists import Finalist, choose_finalist, decode_finalists
from gorgon.decode.vocabulary import draft_vocabulary
from gorgon.models.backbone import load_backbone


@pytest.fixture(scope="module")
def setting():
    """The embedded backbone with heads that are right now and then, prompts, and the model's answers."""
    backbone = load_backbone("embedded", dtype="float32")
    heads = MedusaHeads(3, 1, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight)
    torch.manual_seed(0)
    for head in heads:
        torch.nn.init.normal_(head[0].linear.weight, std=0.02)
    heads.requires_grad_(False)
    engine = Engine(backbone, heads, PLAIN)
    chats = [
        [{"role": "system", "content": r["context"]}, {"role": "user", "content": r["question"]}]
        for r in generate_rows(3, 12)
    ]
    prompts = [encode_prompt(backbone.tokenizer, chat) for chat in chats]
    answers = [g.token_ids for g in engine.generate(prompts, max_new_tokens=50)]
    return engine, prompts, answers


@pytest.mark.parametrize("coverage", [1.0, 0.8])
@pytest.mark.parametrize("kind", ["heads", "heads and n-gram", "dynamic"])
def test_a_replay_is_what_the_engine_does_step_by_step(setting, kind, coverage):
    engine, prompts, answers = setting
    vocabulary = draft_vocabulary(Counter(t for a in answers for t in a), coverage, engine.backbone.vocab_size)
    assert (vocabulary is None) == (coverage == 1.0)
    vocabulary_U = None if vocabulary is None else torch.tensor(vocabulary)
    engine = Engine(engine.backbone, engine.heads, PLAIN, vocabulary_U)
    recordings = [record(engine, p, a, 6) for p, a in zip(prompts, answers, strict=True)]
    ngram = 0 if kind == "heads" else 5
    if kind == "dynamic":
        phrasebook = Phrasebook.of(answers[:8])
        acceptance = count_acceptance(recordings, 2, 4, phrasebook).fit()
        drafter = DynamicDrafter(acceptance, phrasebook, nodes=10, threshold=0.02, width=4)
    else:
        counts = count_prefixes((p for r in recordings for p in r.positions), max_rank=6, ngram=ngram)
        drafter = StaticDrafter(best_tree(counts, 10, ngram=ngram))
    decoding = engine.with_drafter(drafter)
    accepted = 0
    for prompt, answer, recording in zip(prompts, answers, recordings, strict=True):
        generation = decoding.answer(prompt, max_new_tokens=50)
        result = replay_drafter([recording], drafter)
        assert generation.token_ids == answer
        assert len(generation.step_tokens) == result.steps
        assert sum(generation.step_tokens) == result.tokens
        if kind != "dynamic":
            counted = replay([recording.positions], drafter.tree)
            assert (counted.steps, counted.tokens) == (result.steps, result.tokens)
        accepted += sum(node > 0 for node in generation.step_nodes)
    assert accepted > 5, "drafts must be accepted, or this test shows nothing"


def test_a_draft_vocabulary_is_the_most_frequent_tokens():
    counts = Counter({7: 90, 3: 9, 5: 1})
    assert draft_vocabulary(counts, 0.9, 100) == [7]
    assert draft_vocabulary(counts, 0.95, 100) == [3, 7]
    assert draft_vocabulary(counts, 0.999, 100) == [3, 5, 7]
    assert draft_vocabulary(counts, 1.0, 100) is None
    assert draft_vocabulary(counts, 0.999, 3) is None


@pytest.mark.parametrize(
    ("turns", "chosen"),
    [
        ([(1.3, 1.4, 1.4, 1.5), (1.2, 1.2, 1.2, 1.2)], 1),
        ([(1.03, 1.04, 1.04, 1.05), (0.9, 0.9, 0.9, 0.9)], 0),  # too little
        ([(0.8, 0.8, 0.8, 0.8), (1.06, 1.06, 1.1, 1.1)], 2),
        ([(0.7, 0.9, 1.6, 1.9), (1.1, 1.1, 1.1, 1.1)], 2),  # fast now and then
        ([(0.7, 0.9, 1.6, 1.9), (1.0, 1.0, 1.0, 1.0)], 0),
    ],
)
def test_drafting_is_chosen_where_it_is_clearly_faster_than_plain_decoding(turns, chosen):
    trees = [DraftTree(), DraftTree.chain(1), DraftTree.chain(2)]
    finalists = [
        Finalist(Candidate(StaticDrafter(tree), 1.0, tree.nodes, 1.0), 100.0, gains)
        for tree, gains in zip(trees, [(1.0,) * 4, *turns], strict=True)
    ]
    assert choose_finalist(finalists) is finalists[chosen]


@pytest.mark.parametrize(("batch", "groups"), [(1, 3), (4, 4), (16, 4)])
def test_every_finalist_has_several_turns_however_many_are_decoded_together(batch, groups):
    class Counted:
        def __init__(self):
            self.asked = []

        def with_drafter(self, _):
            return self

        def generate(self, prompts, *, max_new_tokens, together):
            self.asked.append((len(prompts), max_new_tokens, together))

    counted, recordings = Counted(), [Recording([1], [5, 2], [], [])] * 200
    candidates = [Candidate(StaticDrafter(tree), 1.0, tree.nodes, 1.0) for tree in (DraftTree(), DraftTree.chain(1))]
    config = TuneConfig(model="embedded", trials=3, finalist_answers=24)
    found = decode_finalists(counted, candidates, recordings, batch, config)
    assert [len(f.over_plain) for f in found] == [3 * groups] * 2
    assert counted.asked == [(max(8, 2 * batch), 2, batch)] * (2 + 2 * 3 * groups)
