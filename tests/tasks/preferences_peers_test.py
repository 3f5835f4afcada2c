"""Losses, rewards and gradients of preference tuning are those of TRL's trainers on the same logits."""

import collections
import types

import flax.linen as nn
import jax
import numpy as np
import pytest

from research.tasks.preferences import Preferences

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed")

B, T, V = 4, 9, 13
IGNORED = -100  # a label of TRL's that does not count


class Table(nn.Module):
    """A model whose parameters are its logits, whatever it reads."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, positions=None):
        return self.param("table", nn.initializers.normal(1.0), (2 * B, T, V))

    def hidden(self, input_ids, attention_mask=None, positions=None):
        return self(input_ids)

    def logits(self, hidden):
        return hidden


def batch():
    """Returns pairs of a prompt of 3 tokens and answers of 2 to 6."""
    rng = np.random.default_rng(0)
    rows, prompts = {"mask": np.ones(B, np.float32)}, rng.integers(1, V, (B, 3))
    for prefix in ("", "rejected_"):
        ids = rng.integers(1, V, (B, T + 1)).astype(np.int32)
        ids[:, :3] = prompts
        attended = np.arange(T) < rng.integers(4, 8, B)[:, None]
        rows[f"{prefix}input_ids"], rows[f"{prefix}targets"] = ids[:, :-1], ids[:, 1:]
        rows[f"{prefix}attention_mask"] = attended.astype(np.int32)
        rows[f"{prefix}target_mask"] = (attended & (np.arange(T) >= 2)).astype(np.float32)
    return rows


ROWS = batch()
POLICY, REFERENCE = (np.random.default_rng(seed).normal(size=(2 * B, T, V)).astype(np.float32) for seed in (1, 2))


def ours(objective, tables=(POLICY, REFERENCE), **options):
    """Returns the loss, its gradient by the logits of [chosen, rejected], and the metrics."""
    task, params = Preferences(Table(), objective, **options), {"table": tables[0], "reference": {"table": tables[1]}}

    def total(params):
        loss, means = task.loss(params, ROWS, jax.random.key(0))
        return loss.compute(), means

    (loss, means), gradients = jax.value_and_grad(total, has_aux=True)(params)
    return loss, gradients["table"].reshape(B, 2, T, V).swapaxes(0, 1).reshape(2 * B, T, V), means


def torch_inputs(tables=(POLICY, REFERENCE)):
    """Returns logits that learn, those of the reference, targets and masks, as TRL has them: chosen, then rejected."""
    policy, reference = (torch.tensor(x.reshape(B, 2, T, V).swapaxes(0, 1).reshape(2 * B, T, V)) for x in tables)
    both = [np.concatenate([ROWS[name], ROWS[f"rejected_{name}"]]) for name in ("targets", "target_mask")]
    return policy.requires_grad_(), reference, torch.tensor(both[0]).long(), torch.tensor(both[1])


def token_log_p(logits, targets, mask):
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask


class Trainer:
    """What TRL's methods ask of the trainer that they belong to; the model is one of logits."""

    def __init__(self, beta, **options):
        same = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        self.accelerator, self.model, self.beta = same, types.SimpleNamespace(training=True), beta
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
        self._total_train_tokens, self._tp_size = 0, 1
        self.aux_loss_enabled, self.precompute_ref_logps, self.label_smoothing, self.alpha = False, True, 0.0, 0.0
        vars(self).update(options)


def outputs(log_p):
    """Returns what TRL's head gives, of which only the log-probabilities matter to the loss."""
    zeros = torch.zeros_like(log_p)
    return types.SimpleNamespace(log_probs=log_p, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def shifted(mask):
    """Returns a mask of all tokens, of which the first is never a target."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask], 1)


def check(objective, options, theirs, logits, chosen, rejected):
    theirs.backward()
    loss, gradient, means = ours(objective, **options)
    np.testing.assert_allclose(loss, theirs.item(), rtol=2e-5)
    np.testing.assert_allclose(gradient, logits.grad, atol=2e-6)
    np.testing.assert_allclose(means["chosen_reward"].compute(), chosen, rtol=2e-5)
    np.testing.assert_allclose(means["rejected_reward"].compute(), rejected, rtol=2e-5)


@pytest.mark.parametrize(("objective", "name"), [("dpo", "sigmoid"), ("ipo", "ipo")])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_and_ipo(objective, name, beta):
    from trl.trainer.dpo_trainer import DPOTrainer

    logits, reference, targets, mask = torch_inputs()
    trainer = Trainer(beta, loss_types=[name], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None)
    trainer.use_weighting = False
    fixed = token_log_p(reference, targets, mask).sum(1)
    inputs = {
        "input_ids": shifted(targets),
        "completion_mask": shifted(mask).long(),
        "attention_mask": shifted(mask).long(),
        "ref_chosen_logps": fixed[:B],
        "ref_rejected_logps": fixed[B:],
    }
    log_p = token_log_p(logits, targets, mask)
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs(log_p), inputs, False)
    rewards = [trainer._metrics["train"][f"rewards/{side}"][0] for side in ("chosen", "rejected")]
    check(objective, {"beta": beta}, theirs, logits, *rewards)
    accuracy = float(ours(objective, beta=beta)[2]["accuracy"].compute())
    assert accuracy == pytest.approx(trainer._metrics["train"]["rewards/accuracies"][0])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
@pytest.mark.parametrize("tables", [(POLICY, REFERENCE), (REFERENCE, POLICY)], ids=["one", "other"])
def test_kto(weights, tables):
    """Exchanging both models changes the sign of the estimated divergence, which is cut off at 0."""
    from trl.trainer.kto_trainer import KTOTrainer

    logits, reference, targets, mask = torch_inputs(tables)
    others, others_mask = torch.zeros(2 * B, T).long(), torch.zeros(2 * B, T)
    for side in range(2):
        for i in range(B):  # the answer of the pair before, after the own prompt
            answer = targets[side * B + (i - 1) % B][mask[side * B + (i - 1) % B] == 1]
            others[side * B + i, 2 : 2 + len(answer)] = answer
            others_mask[side * B + i, 2 : 2 + len(answer)] = 1
    difference = (token_log_p(logits, others, others_mask) - token_log_p(reference, others, others_mask)).sum(1).mean()
    trainer = Trainer(0.3, loss_type="kto", calculate_KL=True, desirable_weight=weights[0])
    trainer.undesirable_weight = weights[1]
    divergence = token_log_p(logits, others, others_mask).sum(1).detach()
    trainer._compute_kl_logps = lambda model, batch: divergence
    inputs = {
        "input_ids": shifted(targets),
        "completion_mask": shifted(mask).long(),
        "attention_mask": shifted(mask).long(),
        "label": torch.arange(2 * B) < B,
        "ref_logps": token_log_p(reference, targets, mask).sum(1),
        "ref_KL_logps": token_log_p(reference, others, others_mask).sum(1),
    }
    log_p = token_log_p(logits, targets, mask)
    theirs = KTOTrainer._compute_loss(trainer, lambda **_: outputs(log_p), inputs, False)
    found = {name: values[0] for name, values in trainer._metrics["train"].items() if values}
    assert found["kl"] == pytest.approx(max(difference.item(), 0))
    options = {"tables": tables, "beta": 0.3, "chosen_weight": weights[0], "rejected_weight": weights[1]}
    check("kto", options, theirs, logits, found["rewards/chosen"], found["rewards/rejected"])


def averages(trainer, logits, targets, mask):
    """Returns TRL's mean log-probabilities of the answers, [chosen, rejected]."""
    labels = shifted(targets.masked_fill(mask == 0, IGNORED))
    labels[:, 0] = IGNORED
    padded = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)  # the last position predicts nothing
    return trainer.get_batch_logps(padded, labels, average_log_prob=True).chunk(2)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo(beta):
    """TRL adds the likelihood over all tokens of a batch, the prompt's too; the paper's is of the chosen answers."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    logits, _, targets, mask = torch_inputs()
    chosen, rejected = averages(ORPOTrainer, logits, targets, mask)
    ratios, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(Trainer(beta), chosen, rejected)
    theirs = -chosen.mean() - ratios.mean()
    check("orpo", {"beta": beta}, theirs, logits, *(x.mean() for x in rewards))


@pytest.mark.parametrize(("beta", "margin"), [(2.0, 0.5), (2.5, 1.4)])
def test_simpo(beta, margin):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    logits, _, targets, mask = torch_inputs()
    chosen, rejected = averages(CPOTrainer, logits, targets, mask)
    trainer = Trainer(beta, loss_type="simpo", simpo_gamma=margin)
    losses, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    options = {"beta": beta, "target_margin": margin}
    check("simpo", options, losses.mean(), logits, *(x.mean() for x in rewards))
