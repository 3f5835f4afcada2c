"""Divergences and their gradients are those of TRL's GKD trainer on the same logits."""

import jax
import numpy as np
import pytest

from research.models import gpt
from research.tasks.lm_distillation import LanguageModelDistillation

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0), ("reverse", 1)])
def test_divergences(divergence, beta, temperature):
    """TRL does not multiply by the square of the temperature."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = (np.random.default_rng(i).normal(size=(2, 5, 11)).astype(np.float32) for i in range(2))
    counts = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]])
    leaf = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(counts, 1, -100))
    theirs = GKDTrainer.generalized_jsd_loss(leaf, torch.tensor(teacher), labels, beta, temperature)
    theirs.backward()
    sizes = gpt.Decoder(11, 8, 1, 2, intermediate_size=8)
    task = LanguageModelDistillation(model=sizes, teacher=sizes, divergence=divergence, temperature=temperature)
    loss = lambda logits: (task._divergence(logits, teacher) * counts).sum() / counts.sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, temperature**2 * theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, temperature**2 * leaf.grad, atol=1e-6)
