"""dpo.py's losses, rewards and gradients against TRL's trainers: their own compute_loss on the same
weights and the same ids."""

import pytest
import torch

from dpo import Args, PairIds, Pairs, fill_reference, pair_loss, pair_means
from formats.hub import to_folder_names
from model import Config, Transformer
from runtime import Runtime

pytestmark = pytest.mark.peers
V = 61


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reference that differ, as folders both sides read."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("policy", "ref")):
        torch.manual_seed(seed)
        model = Transformer(Config("llama", V, 32, 48, 2, 4, 2, 8, 64, tie_word_embeddings=False))
        for p in model.parameters():
            torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.15)
        model.save_pretrained(root / name)
    return root


def some_pairs(count, lengths=None, prompt=None):
    """PairIds of many lengths; ids from 3 on, as 0 pads."""
    torch.manual_seed(0)

    def ids(n):
        return torch.randint(3, V, (n,)).tolist()

    pairs = []
    for i in range(count):
        chosen, rejected = lengths or (2 + i, 9 - i)
        pairs.append(PairIds(ids(prompt or 1 + 3 * i), ids(chosen), ids(rejected)))
    return pairs


def ours(models, pairs, args):
    """-> (mean loss, {metric: mean}, {folder name: gradient})"""
    model = Transformer.from_pretrained(models / "policy")
    pairs = Pairs(pairs)
    runtime = Runtime(torch.device("cpu"), torch.float32, False)
    fill_reference(pairs, Transformer.from_pretrained(models / "ref"), runtime, 3)
    loss, sums = pair_loss(model, pairs.fill(list(range(len(pairs.pairs))), 0), args)
    loss = loss / len(pairs.pairs)
    loss.backward()
    gradients = to_folder_names({n: p.grad for n, p in model.named_parameters()}, model.config)
    return loss.item(), pair_means(sums, args, runtime), gradients


def some_words():
    """A tokenizer that a trainer never has to use."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = Words(kinds.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def trainer_of(kind, models, **settings):
    """One of TRL's trainers around the policy, with the reference if it takes one."""
    from transformers import AutoModelForCausalLM

    from peers.trl import make_trainer

    parts = {}
    if kind == "DPO":
        parts["ref_model"] = AutoModelForCausalLM.from_pretrained(models / "ref")
    settings |= {"max_length": None, "per_device_train_batch_size": 4}
    return make_trainer(kind, models / "policy", some_words(), parts=parts, **settings)


def compare(trainer, inputs, mine, atol=1e-5):
    """Loss, gradients and the metrics both log."""
    loss, metrics, gradients = mine
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=atol)
    got = {n: p.grad for n, p in trainer.model.named_parameters()}
    assert got.keys() == gradients.keys() and max(g.abs().max() for g in got.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, got[name], atol=atol, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    stored = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    logged = {k: v[-1] for k, v in stored["train"].items() if k in metrics}
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    } <= logged.keys()
    return {k: pytest.approx(v, abs=atol) for k, v in logged.items()}, metrics


@pytest.mark.parametrize(
    "types, ours_is",
    [(["sigmoid"], {}), (["ipo"], dict(loss="ipo")), (["sigmoid", "sft"], dict(sft_weight=0.7))],
)
def test_loss_rewards_and_gradients_equal_trls_dpo_trainer(types, ours_is, models):
    weights = dict(loss_weights=[1.0, 0.7]) if len(types) == 2 else {}
    trainer = trainer_of("DPO", models, loss_type=types, beta=0.3, **weights)
    pairs = some_pairs(
        4, (5, 7) if weights else None
    )  # TRL's SFT term is a mean over tokens, ours over pairs: equal lengths
    inputs = trainer.data_collator(
        [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in pairs]
    )
    logged, metrics = compare(trainer, inputs, ours(models, pairs, Args(beta=0.3, **ours_is)))
    assert "rewards/accuracies" in logged and logged == {k: metrics[k] for k in logged}


def test_label_smoothing_equals_trls(models):
    """The installed DPOTrainer smooths the sigmoid loss only under the name aot, which on a batch
    of one sorts nothing."""
    trainer = trainer_of("DPO", models, loss_type=["aot"], beta=0.3, label_smoothing=0.2)
    pairs = some_pairs(1)
    inputs = trainer.data_collator(
        [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in pairs]
    )
    logged, metrics = compare(
        trainer, inputs, ours(models, pairs, Args(beta=0.3, label_smoothing=0.2))
    )
    assert logged == {k: metrics[k] for k in logged}


def concatenated(pairs):
    """A batch as TRL's CPO and ORPO trainers take it."""
    batch = {}
    for side in ("chosen", "rejected"):
        answers = [(pair.prompt, getattr(pair, side)) for pair in pairs]
        rows = [torch.tensor(prompt + answer) for prompt, answer in answers]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in answers]
        pad = torch.nn.utils.rnn.pad_sequence
        batch |= {
            f"{side}_input_ids": pad(rows, True, 0),
            f"{side}_labels": pad(labels, True, -100),
            f"{side}_attention_mask": pad([torch.ones_like(r) for r in rows], True, 0),
        }
    return batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_equals_trls_cpo_trainer(smoothing, models):
    trainer = trainer_of(
        "CPO",
        models,
        loss_type="simpo",
        beta=2.0,
        simpo_gamma=0.7,
        cpo_alpha=0.0,
        label_smoothing=smoothing,
    )
    pairs = some_pairs(4)
    mine = ours(models, pairs, Args(loss="simpo", beta=2.0, gamma=0.7, label_smoothing=smoothing))
    logged, metrics = compare(trainer, concatenated(pairs), mine)
    for k in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[k] == logged[k]


def test_orpo_equals_trls_orpo_trainer(models):
    """Its SFT loss is a mean over all tokens, the prompt's too: prompts of one token and equal
    lengths make that ours."""
    trainer = trainer_of("ORPO", models, beta=0.4)
    pairs = some_pairs(4, (6, 9), prompt=1)
    logged, metrics = compare(
        trainer, concatenated(pairs), ours(models, pairs, Args(loss="orpo", beta=0.4))
    )
    for k in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[k] == logged[k]
