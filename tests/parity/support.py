"""What the parity tests share: tiny random models of many families, a drafter that knows the answers, and a stand-in
for CUDA graphs."""

import contextlib
import copy
import functools
import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from gorgon.core.draft import Draft
from gorgon.core.tree import DraftTree
from gorgon.decode.engine import Engine
from gorgon.models.backbone import Backbone
from gorgon.models.families import attention_of

VOCAB = 61
CONTEXT = 96
TREES = {
    "plain": DraftTree(),
    "chain": DraftTree.chain(4),
    "wide": DraftTree.of([(0,), (1,), (2,)]),
    "bushy": DraftTree.of([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 1, 2), (0, 1, 2, 1)]),
    "ngram": DraftTree.of([], ngram=4),
    "bushy + ngram": DraftTree.of([(0,), (2,), (0, 1), (2, 0), (2, 0, 0)], ngram=3),
}


class Tokenizer:
    """Token i is the i-th letter of a made-up alphabet."""

    pad_token_id = 0
    eos_token_id = 1

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x4E00 + i) for i in ids)


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": CONTEXT, "eos_token_id": 1,
    "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False, "attention_dropout": 0.0,
}  # fmt: skip
WINDOW = 6
"""Far shorter than the texts, so that it decides which tokens come out."""
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied, one group": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 4096}),
    "mistral, short window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "phi3, short window": ("phi3", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 16,
                          "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED,
                               "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW, "layer_types": MIXED}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": False}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "gpt-neox": ("gpt_neox", {}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": MIXED}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "stablelm, small heads": ("stablelm", {"num_attention_heads": 4}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "deepseek-v3": ("deepseek_v3", {"num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": 16, "v_head_dim": 16,
                                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_routed_experts": 4, "n_group": 1,
                                    "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_inner": 48, "n_positions": CONTEXT}),
    "gpt-oss": ("gpt_oss", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED, "num_local_experts": 4,
                            **EXPERTS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, **EXPERTS}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
}  # fmt: skip
ONE_LAYER = {
    "llama, one layer": ("llama", {"num_hidden_layers": 1}),
    "gemma2, one layer": ("gemma2", {"head_dim": 16, "sliding_window": WINDOW, "layer_types": MIXED[:1],
                                     "num_hidden_layers": 1, "final_logit_softcapping": 2.0}),
}  # fmt: skip
"""For steps that are compiled, which costs seconds a layer."""


def config_of(model_type, **extra):
    wanted = {**SMALL, **extra}
    return AutoConfig.for_model(model_type, **wanted)


@functools.cache
def _model(family):
    model_type, extra = (FAMILIES | ONE_LAYER)[family]
    config = config_of(model_type, **extra)
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention_of(config))
    return model.eval().requires_grad_(False)


def backbone_of(family, *, eos=1, own=False):
    """A fresh backbone object on the family's one tiny model, or on a copy to be changed."""
    model = copy.deepcopy(_model(family)) if own else _model(family)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    return Backbone(family, model, Tokenizer(), torch.device("cpu"), torch.float32)


@functools.cache
def _reference(family, end_ids, prompt, limit, options):
    model = _model(family)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit,
        **{"do_sample": False, "eos_token_id": list(end_ids), "pad_token_id": 0, **dict(options)},
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


def reference(backbone, prompt, limit, **options):
    """What transformers' own generate writes behind the prompt."""
    ends, given = tuple(sorted(backbone.end_ids)), tuple(sorted(options.items()))
    return list(_reference(backbone.name, ends, tuple(prompt), limit, given))


def prompts(sizes=(1, 2, 9, 30), seed=7):
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(size)] for size in sizes]


@contextlib.contextmanager
def no_numbers_of(backbone, token):
    """Meanwhile the model makes NaN of a token, and of what follows it."""

    def poison(_module, given, embedded):
        return torch.where((given[0] == token)[..., None], float("nan"), embedded)

    hook = backbone.model.get_input_embeddings().register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


class Oracle:
    """A drafter that knows the answers: each depth's true token stands at a random rank, or nowhere.

    A random model's continuation is unguessable, so real heads would never exercise acceptance.
    """

    heads, width, copies = 0, 0, True

    def __init__(self, tree, answers, *, right=0.8):
        """Args: answers: pairs of a prompt and its answer. right: how often the true token is drafted."""
        self.tree, self.nodes, self.answers, self.right = tree, tree.nodes, answers, right

    def draft(self, root, choices, context):
        tree, tokens = self.tree, context.tokens.tolist()
        known = [(p, a) for p, a in self.answers if tokens[: len(p)] == list(p)]
        prompt, answer = max(known, key=lambda pair: len(pair[0]))
        at = len(tokens) - len(prompt)
        rng = random.Random(f"{at} {len(prompt)} {root}")
        table = [[rng.randrange(VOCAB) for _ in range(tree.width)] for _ in range(tree.heads)]
        for row, token in zip(table, answer[at:], strict=False):
            if rng.random() < self.right:
                row[rng.randrange(tree.width)] = token
        draft = Draft(root)
        for path, parent in zip(tree.paths, tree.parents[1:], strict=False):
            draft.add(table[len(path) - 1][path[-1]], parent)
        last = 0
        for token in context.propose(tree.ngram):
            last = draft.add(token, last)
        return draft


def oracle_engine(backbone, tree, asked, limit=40, **options):
    """An engine whose drafts for these prompts are often right."""
    return Engine(backbone, None, Oracle(tree, [(p, reference(backbone, p, limit, **options)) for p in asked]))


class Again:
    """Runs the function again at each replay, into the tensors of the capture. As in CUDA, a capture computes nothing:
    outputs are rubbish until the first replay."""

    def __init__(self, function):
        self._function = function
        function()
        self.outputs = function()
        for tensor in self.outputs:
            tensor.fill_(-7)

    def replay(self):
        for mine, new in zip(self.outputs, self._function(), strict=True):
            mine.copy_(new)


class Recorder:
    """Counts what it captures."""

    def __init__(self):
        self.captured = 0

    def capture(self, function):
        self.captured += 1
        return Again(function)

    def fetch(self, table):
        return table.tolist()
