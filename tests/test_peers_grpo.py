"""grpo.py's losses, KL and gradients against TRL's GRPOTrainer: its own advantages' formula and
compute_loss on the same weights, ids, rewards and old log-probs."""

from types import SimpleNamespace

import pytest
import torch
from test_peers_dpo import V, models, some_words  # noqa: F401

from formats.hub import to_folder_names
from grpo import Args, Environment, Group, answer_loss, batch_of, reference_log_probs
from model import Transformer
from runtime import Runtime

pytestmark = pytest.mark.peers
CPU = Runtime(torch.device("cpu"), torch.float32, False)
GROUP = 4


def some_groups(count=3):
    """Groups of answers of many lengths, with log-probs that a policy some steps ago might have
    had."""
    torch.manual_seed(0)
    groups = []
    for i in range(count):
        answers = [torch.randint(3, V, (1 + (3 * i + 2 * j) % 7,)).tolist() for j in range(GROUP)]
        prompt = torch.randint(3, V, (2 + 3 * i,)).tolist()
        log_probs = [(-4 - torch.rand(len(ids))).tolist() for ids in answers]
        rewards = torch.rand(GROUP).tolist()
        groups.append(Group(prompt, answers, log_probs, rewards))
    return groups


def ours(folder, reference, groups, args):
    """-> (loss, mean KL, share clipped, {folder name: gradient}); `old` are the Groups' log-probs,
    and the sampler's the same."""
    model = Transformer.from_pretrained(folder)
    ref = Transformer.from_pretrained(reference)
    own = Environment(None, [], ref)
    run = SimpleNamespace(args=args, model=model, step_model=model, own=own)
    batch, count = batch_of(groups, args, CPU)
    old = batch.sampled[batch.y != -100]
    totals = dict.fromkeys(("targets", "gap_mean", "gap_max", "pushed", "clipped", "kl"), 0)
    ref = reference_log_probs(run, batch) if args.beta else None
    loss, _ = answer_loss(run, batch, (old, ref), totals)
    loss = loss / count
    loss.backward()
    gradients = to_folder_names({n: p.grad for n, p in model.named_parameters()}, model.config)
    means = [totals[name] / totals["pushed"] for name in ("kl", "clipped")]
    return loss.item(), *means, gradients


def theirs(trainer, reference, groups):
    """-> (loss, kl, clipped) of compute_loss, which leaves gradients in trainer.model."""
    from transformers import AutoModelForCausalLM

    prompts = [group.prompt for group in groups for _ in range(GROUP)]
    answers = [answer for group in groups for answer in group.answers]
    log_probs = [log_p for group in groups for log_p in group.log_probs]
    rewards = torch.tensor([group.rewards for group in groups])
    advantages = rewards - rewards.mean(1, keepdim=True)
    if trainer.scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)

    def padded(rows, left=False, value=0):
        rows = [torch.tensor(row[::-1] if left else row) for row in rows]
        table = torch.nn.utils.rnn.pad_sequence(rows, True, value)
        return table.flip(1) if left else table

    inputs = {
        "prompt_ids": padded(prompts, left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], left=True),
        "completion_ids": padded(answers),
        "completion_mask": padded([[1] * len(ids) for ids in answers]),
        "old_per_token_logps": padded(log_probs, value=0.0),
        "advantages": advantages.flatten(),
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    kept = inputs["completion_ids"].size(1)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(reference)(ids, attention_mask=mask).logits
        log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        inputs["ref_per_token_logps"] = log_p[:, -kept:]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    logged = trainer._metrics["train"]
    return loss.item(), logged.get("kl", [0])[-1], logged["clip_ratio/region_mean"][-1]


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize("loss, high", [("grpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28)])
def test_loss_kl_clipping_and_gradients_equal_trls_grpo_trainer(loss, high, beta, models):  # noqa: F811
    from peers.trl import make_trainer

    trainer = make_trainer(
        "GRPO",
        models / "policy",
        some_words(),
        parts={"reward_funcs": lambda completions, **_: [0.0] * len(completions)},
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        loss_type=loss,
        beta=beta,
        epsilon=0.2,
        epsilon_high=high,
        max_completion_length=16,
        scale_rewards="none" if loss == "dr_grpo" else "group",
    )
    trainer.current_gradient_accumulation_steps = 1
    groups = some_groups()
    args = Args(loss=loss, beta=beta, group=GROUP, max_tokens=16)
    value, kl, clipped, gradients = ours(models / "policy", models / "ref", groups, args)
    found = theirs(trainer, models / "ref", groups)
    assert [value, kl, clipped] == pytest.approx(found, abs=1e-5)
    assert 0.05 < clipped < 0.95
    got = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert got.keys() == gradients.keys() and max(g.abs().max() for g in got.values()) > 1e-3
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, got[name], atol=1e-5, rtol=1e-5)
