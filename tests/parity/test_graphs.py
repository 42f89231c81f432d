"""Captured steps: the same tokens, whichever shapes come and go. Without a GPU a recorder stands in that runs a step
again on the static tensors; the tests marked `gpu` capture and replay CUDA graphs.
"""

import gc

import pytest
import torch

from gorgon.core.acceptance import AcceptanceCounts
from gorgon.core.heads import MedusaHeads
from gorgon.core.phrasebook import Phrasebook
from gorgon.core.sampling import Sampling
from gorgon.data.chat import encode_prompt
from gorgon.data.sample import generate_rows
from gorgon.decode.drafts import StaticDrafter
from gorgon.decode.dynamic import DynamicDrafter
from gorgon.decode.engine import PLAIN, Engine
from gorgon.decode.request import Request
from gorgon.decode.step import PROMPT_SIZES
from gorgon.errors import MissingDependencyError
from gorgon.models.backbone import Backbone, load_backbone
from gorgon.models.compiler import pick_mode
from gorgon.models.graphs import Graphs
from tests.parity.support import TREES, Oracle, Recorder, backbone_of, no_numbers_of, prompts

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: CUDA graphs are not run")
SAMPLED = Sampling(temperature=3.0, seed=3)


class Failing(Recorder):
    """Cannot hold the second function."""

    def capture(self, function):
        if self.captured:
            function()
            raise RuntimeError("called a synchronizing CUDA operation\nmore of the message")
        return super().capture(function)


class Forgetful(Recorder):
    """Holds outputs and nothing else, as a CUDA graph does."""

    def capture(self, function):
        made = super().capture(function)
        made.replay()
        made._function, made.replay = None, lambda: None
        return made


@pytest.fixture(scope="module")
def eager():
    """The embedded backbone with heads that are right now and then."""
    backbone = load_backbone("embedded", dtype="float32", device="cpu")
    return with_heads(backbone)


def with_heads(backbone):
    heads = MedusaHeads(3, 1, backbone.hidden_size, backbone.vocab_size)
    heads.start_from(backbone.lm_head.weight.float().cpu())
    torch.manual_seed(0)
    for head in heads:
        torch.nn.init.normal_(head[0].linear.weight, std=0.02)
    return Engine(backbone, heads.requires_grad_(False).to(backbone.device, backbone.dtype), PLAIN)


@pytest.fixture(scope="module")
def asked(eager):
    chats = [
        [{"role": "system", "content": r["context"]}, {"role": "user", "content": r["question"]}]
        for r in generate_rows(3, 5)
    ]
    return [encode_prompt(eager.backbone.tokenizer, chat) for chat in chats]


def captured(engine, recorder=None, most=64):
    """The engine on a backbone object of its own, same weights, whose steps are captured."""
    old = engine.backbone
    backbone = type(old)(old.name, old.model, old.tokenizer, old.device, old.dtype, "captured")
    backbone.graphs = Graphs(recorder or Recorder(), most)
    return Engine(backbone, engine.heads, PLAIN)


def prompt_sizes(asked):
    return {-(-len(prompt) // PROMPT_SIZES) for prompt in asked}


def drafters():
    acceptance = AcceptanceCounts(3).fit()  # of nothing: every candidate is as likely
    return {
        "plain": PLAIN,
        "static": StaticDrafter(TREES["bushy + ngram"]),
        "dynamic": DynamicDrafter(acceptance, Phrasebook(), nodes=10, threshold=1e-4, width=4),
    }


def answers(engine, drafter, asked, together, sampling=()):
    """Tokens and accepted nodes of requests decoded together, each with its own sampling."""
    slots = engine.with_drafter(drafter).slots(together, 512)
    waiting, runs = list(zip(asked, [*sampling, *[Sampling()] * len(asked)], strict=False)), []
    while waiting or slots.running:
        if waiting and slots.free:
            prompt, how = waiting.pop(0)
            runs.append(slots.admit(Request(prompt, 24, sampling=how, logprobs=2), stream=len(runs)))
            slots.read_prompt()
        slots.step()
    assert all(r.error is None for r in runs)
    return [
        (r.generation.token_ids, r.generation.step_nodes, [p.likeliest[0][0] for p in r.generation.logprobs])
        for r in runs
    ]


@pytest.mark.parametrize("kind", drafters())
@pytest.mark.parametrize("together", [1, 3])
def test_whole_answers_are_the_same(eager, asked, kind, together):
    recorder, drafter = Recorder(), drafters()[kind]
    engine = captured(eager, recorder)
    assert answers(engine, drafter, asked, together) == answers(eager, drafter, asked, together)
    steps = sum(len(nodes) for _, nodes, _ in answers(eager, drafter, asked, together))
    most = 2 * together + len(prompt_sizes(asked))
    assert 0 < recorder.captured <= most < steps, "one graph for each batch size and 256 rows of context, or prompt"


@pytest.mark.parametrize("kind", drafters())
@pytest.mark.parametrize("together", [1, 3])
def test_sampled_answers_alone_and_beside_greedy_ones(eager, asked, kind, together):
    drafter, sampling = drafters()[kind], [SAMPLED, Sampling(), SAMPLED]
    found = answers(captured(eager), drafter, asked, together, sampling)
    assert found == answers(eager, drafter, asked, together, sampling)
    assert found[0][0] != answers(eager, drafter, asked, together)[0][0], "or nothing was sampled"


def test_a_growing_context_takes_the_next_graph(eager, asked):
    """The answer passes 256 rows, where a graph that reads fewer would miss the newest."""
    prompt = (asked[0] * 5)[: 256 - 20]
    recorder = Recorder()
    expected = eager.answer(prompt, max_new_tokens=40).token_ids
    assert captured(eager, recorder).answer(prompt, max_new_tokens=40).token_ids == expected
    assert recorder.captured == 1 + 2 or len(expected) < 25, "the prompt's, and two of steps"


@pytest.mark.parametrize("most", [1, 2])
def test_the_shape_used_longest_ago_goes_first(eager, asked, most):
    recorder, drafter = Recorder(), drafters()["static"]
    engine = captured(eager, recorder, most)
    sampling = [SAMPLED, Sampling(), Sampling()]
    assert answers(engine, drafter, asked, 3, sampling) == answers(eager, drafter, asked, 3, sampling)
    assert 0 < len(engine.backbone.graphs) <= 2 * most < recorder.captured, "of two caches: prompts have their own"


def counted_twice(engine, asked, count):
    """What `count` says after an answer, and after the same again on the same slots."""
    slots, counts = engine.with_drafter(drafters()["dynamic"]).slots(1, 512), []
    for _ in range(2):
        slots.admit(Request(asked[0], 12, ignore_end=True))
        slots.read_prompt()
        while slots.running:
            slots.step()
        counts.append(count())
    return counts


def test_a_shape_is_captured_once(eager, asked):
    recorder = Recorder()
    counts = counted_twice(captured(eager, recorder), asked, lambda: recorder.captured)
    assert counts[0] == counts[1] == 2, "the prompt's and the step's"


@pytest.mark.parametrize("together", [1, 3])
def test_calls_that_follow_replay_what_was_captured(eager, asked, together):
    recorder = Recorder()
    engine = captured(eager, recorder)
    drafters_in_turn = [drafters()[kind] for kind in ("static", "plain", "static", "plain")]
    expected = [a.token_ids for a in eager.generate(asked, max_new_tokens=24)]
    counts = []
    for drafter in drafters_in_turn:
        found = engine.with_drafter(drafter).generate(asked, max_new_tokens=24, together=together)
        assert [a.token_ids for a in found] == expected
        counts.append(recorder.captured)
    assert 0 < counts[0] < counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("most", [None, 7])
@pytest.mark.parametrize("together", [1, 2])
def test_a_failed_prompt_leaves_nothing_to_the_next(eager, asked, together, most):
    """Captured steps are given more rows than a text has: what was there before is masked, and has to be numbers."""
    expected = eager.answer(asked[1], max_new_tokens=12).token_ids
    bad = next(t for t in asked[0][2:] if t not in {*asked[1], *expected})
    engine = captured(eager)
    slots = engine.slots(together, 512)
    with no_numbers_of(engine.backbone, bad):
        failed = slots.admit(Request([*asked[0], *asked[0]], 12))
        while not slots.read_prompt(most):
            pass
        assert "not finite" in str(failed.error) and slots.free == together
        assert most is None or failed.read < len(asked[0]), "what follows is not read"
        running = slots.admit(Request(asked[1], 12))
        slots.read_prompt()
        while slots.running:
            slots.step()
    assert running.error is None and running.generation.token_ids == expected


def test_new_buffers_are_captured_anew(eager, asked):
    recorder = Recorder()
    engine = captured(eager, recorder)
    expected = eager.answer(asked[0], max_new_tokens=12).token_ids
    slots = engine.slots(1, 512)
    running = slots.admit(Request(asked[0], 12))
    slots.read_prompt()
    slots.step()
    cache = slots._cache
    cache.keys, cache.values = [t.clone() for t in cache.keys], [t.clone() for t in cache.values]
    while slots.running:
        slots.step()
    assert recorder.captured == 1 + 2 and running.generation.token_ids == expected


def test_other_heads_on_the_same_cache_are_captured_anew(eager, asked):
    """Their graph holds the addresses of their weights; tokens would be right all the same, but not what is drafted."""
    other = MedusaHeads(3, 1, eager.backbone.hidden_size, eager.backbone.vocab_size).requires_grad_(False)
    drafter = drafters()["static"]

    def both(engine):
        slots, found = engine.with_drafter(drafter).slots(1, 512), []
        for heads in (engine.heads, other):
            slots.use(Engine(engine.backbone, heads, drafter))
            running = slots.admit(Request(asked[0], 24))
            slots.read_prompt()
            drafts = []
            while slots.running:
                slots.step()
                drafts.append(running.draft.tokens)
            found.append((running.generation.token_ids, drafts))
        return found

    first, second = both(captured(eager))
    assert [first, second] == both(eager) and first[0] == second[0] and first[1] != second[1]


def test_a_cache_that_is_gone_takes_its_graphs_with_it(eager, asked):
    engine = captured(eager, Forgetful())
    slots = engine.slots(1, 512)
    slots.admit(Request(asked[0], 2))
    slots.read_prompt()
    slots.step()
    assert len(engine.backbone.graphs) == 2
    del slots
    gc.collect()
    assert len(engine.backbone.graphs) == 0


def test_steps_that_cannot_be_captured_run_one_by_one_and_say_so_once(eager, asked, capsys):
    recorder, drafter = Failing(), drafters()["static"]
    engine = captured(eager, recorder)
    sampling = [Sampling(), SAMPLED, Sampling()]
    assert answers(engine, drafter, asked, 2, sampling) == answers(eager, drafter, asked, 2, sampling)
    said = capsys.readouterr().err
    assert said.count("cannot be captured") == 1 and "synchronizing CUDA operation\n" in said
    assert recorder.captured == 1 and len(engine.backbone.graphs) == 0 and engine.backbone.graphs.failed


def test_the_mode_is_for_gpus(monkeypatch):
    gpu = torch.device("cuda")
    assert pick_mode("captured", 1, gpu) == "captured"
    assert pick_mode("auto", 1 << 40, torch.device("cpu")) == "recorded"
    for triton, mode in ((True, "compiled"), (False, "captured")):
        monkeypatch.setattr("gorgon.models.compiler.triton_works", lambda triton=triton: triton)
        assert pick_mode("auto", 1 << 40, gpu) == mode
    for mode, device, why in (("captured", torch.device("cpu"), "CUDA"), ("compiled", gpu, "Triton"),
                              ("recorded", gpu, "CPU")):  # fmt: skip
        with pytest.raises(MissingDependencyError, match=why) as error:
            pick_mode(mode, 1, device)
        assert error.value.exit_code == 2 and error.value.field == "steps" and mode not in error.value.allowed


@pytest.fixture(scope="module")
def one_by_one():
    return with_heads(load_backbone("embedded", dtype="float32", device="cuda"))


@pytest.fixture(scope="module", params=["captured", "compiled"])
def on_gpu(request):
    engine = with_heads(load_backbone("embedded", dtype="float32", device="cuda"))
    engine.backbone.run_steps(request.param)
    return engine


@gpu
@needs_cuda
@pytest.mark.parametrize("kind", drafters())
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("sampling", [(), (SAMPLED, Sampling(), SAMPLED)], ids=["greedy", "sampled"])
def test_cuda_graphs_write_the_tokens_of_eager_steps(one_by_one, on_gpu, asked, kind, together, sampling):
    expected = answers(one_by_one, drafters()[kind], asked, together, sampling)
    for _ in range(2):  # captured, then replayed alone
        assert answers(on_gpu, drafters()[kind], asked, together, sampling) == expected
    assert not on_gpu.backbone.graphs.failed


@gpu
@needs_cuda
def test_a_cuda_graph_is_captured_once(on_gpu, asked):
    counts = counted_twice(on_gpu, asked, lambda: len(on_gpu.backbone.graphs))
    assert counts[0] == counts[1] > 0


@gpu
@needs_cuda
@pytest.mark.parametrize("family", ["gemma2", "mistral, short window", "gpt-neox"])
def test_families_compiled_on_a_gpu(family):
    """Soft-capping keeps torch's attention with its masks; windows shape the spans; biases keep products apart."""
    small = backbone_of(family, own=True)
    expected = [Engine(small, None, PLAIN).answer(p, max_new_tokens=20).token_ids for p in prompts()]
    backbone = Backbone(family, small.model.to("cuda"), small.tokenizer, torch.device("cuda"), torch.float32)
    backbone.run_steps("compiled")
    engine = Engine(backbone, None, Oracle(TREES["bushy + ngram"], list(zip(prompts(), expected, strict=True))))
    found = [engine.answer(p, max_new_tokens=20).token_ids for p in prompts()]
    assert found == expected and not backbone.graphs.failed


@gpu
@needs_cuda
def test_cuda_graphs_in_the_dtype_of_a_gpu(asked):
    """bfloat16 rounds by shape: most tokens are the same, and nothing breaks over a long answer."""
    graphs = with_heads(load_backbone("embedded", dtype="bfloat16", device="cuda"))
    graphs.backbone.run_steps("auto")
    assert graphs.backbone.steps == "compiled"
    found = graphs.with_drafter(drafters()["dynamic"]).generate(asked, max_new_tokens=300, together=3)
    assert all(len(g.token_ids) > 1 for g in found) and not graphs.backbone.graphs.failed
