"""The engine beside transformers: the same greedy text for every family, the same sampling
filters, valid JSON."""

import json

import pytest
import torch
from test_peers_model import FAMILIES, theirs
from test_scheduler import CheckedEngine, make_model, row

from engine.sampler import Sampling, draw_settings, draw_tokens, edit_logits, kept_tokens
from generate import Engine
from tokenizer import Tokenizer

pytestmark = pytest.mark.peers


def greedy(reference, prompt, new):
    ids = torch.tensor([prompt])
    reference.generation_config.eos_token_id = None
    return reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(family, tmp_path):
    """Three prompts at once, read in chunks: past the sliding windows and the original rope
    lengths."""
    reference = theirs(family, tmp_path)
    prompts = [
        torch.randint(3, 160, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        for n in (90, 7, 40)
    ]
    engine = CheckedEngine(tmp_path, "cpu", "float32", step_tokens=33, max_seqs=3)
    outputs = engine.generate(prompts, Sampling(max_tokens=50, temperature=0, ignore_eos=True))
    assert [o.token_ids for o in outputs] == [greedy(reference, p, 50) for p in prompts]


def test_stories260k_writes_the_same_text_from_its_folder_and_from_gguf(data_dir, tmp_path):
    import transformers

    from formats import gguf

    folder, prompt = data_dir / "stories260K", [1, 403, 407, 261, 378]  # "Once upon a time"
    expected = greedy(transformers.AutoModelForCausalLM.from_pretrained(folder), prompt, 150)
    gguf.write(folder, tmp_path / "model.gguf", "f32")
    for source in (folder, tmp_path / "model.gguf"):
        output = Engine(source, "cpu", "float32").generate(
            prompt, Sampling(max_tokens=150, temperature=0, ignore_eos=True)
        )[0]
        assert output.token_ids == expected, source


def test_filters_and_penalties_equal_transformers():
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0)) * 3
    options = [
        dict(top_k=40),
        dict(top_p=0.8),
        dict(min_p=0.05),
        dict(top_k=100, top_p=0.7, min_p=0.02),
    ]
    mine = kept_tokens(logits, draw_settings([row(Sampling(**o)) for o in options], 0, 4))
    for scores, o, keep in zip(logits, options, mine):
        chain = LogitsProcessorList()
        for name, kind in (
            ("top_k", TopKLogitsWarper),
            ("top_p", TopPLogitsWarper),
            ("min_p", MinPLogitsWarper),
        ):
            if name in o:
                chain.append(kind(o[name]))
        assert torch.equal(
            chain(torch.zeros(1, 1).long(), scores[None].clone())[0] > -torch.inf, keep
        ), o
    ids = torch.tensor([[3, 5, 5, 7]])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(ids, logits[:1].clone())
    edit_logits(logits[:1], [row(Sampling(repetition_penalty=1.4), prompt=[3, 5], output=[5, 7])])
    assert torch.allclose(logits[:1], expected)


def test_sampled_frequencies_equal_transformers_probabilities():
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopPLogitsWarper(0.9)])
    p = chain(torch.zeros(1, 1).long(), logits.clone()).softmax(-1)
    count = 20_000
    rows = [row(Sampling(temperature=0.8, top_p=0.9))] * count
    u = (torch.arange(count) + 0.5) / count
    seen = torch.bincount(draw_tokens(logits.repeat(count, 1), rows, u)[0], minlength=50) / count
    assert torch.allclose(
        seen, p[0], atol=2e-4
    )  # evenly spread uniforms: the frequencies are the probabilities


SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0},
            "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 4},
    {"anyOf": [{"type": "boolean"}, {"const": 7}]},
]


@pytest.mark.slow
def test_five_hundred_constrained_answers_of_an_untrained_model_are_valid(tmp_path):
    import jsonschema

    from engine.grammar import Constraint, Vocabulary, json_grammar

    make_model(tmp_path, context=256)
    Tokenizer.char('{}[]":,.-+ \\0123456789eE' + "".join(sorted(set("nameagtsbulr fo")))).save(
        tmp_path
    )
    folder = tmp_path
    vocabulary_size = Tokenizer.load(folder).vocab_size
    from model import Config, Transformer

    torch.manual_seed(0)
    model = Transformer(Config("qwen3", vocabulary_size, 16, 32, 2, 4, 2, 8, 256))
    model.init_weights()
    model.save_pretrained(folder)
    engine = Engine(folder, "cpu", "float32", max_seqs=32)
    vocabulary = Vocabulary(engine.tok)
    constraints = [Constraint(json_grammar(schema), vocabulary) for schema in SCHEMAS]
    samplings = [
        Sampling(max_tokens=120, seed=i, constraint=constraints[i % 3]) for i in range(500)
    ]
    for i, output in enumerate(engine.generate([[1, 2]] * 500, samplings)):
        jsonschema.validate(json.loads(output.text), SCHEMAS[i % 3])
