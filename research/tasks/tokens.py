"""What objectives that predict tokens share: their loss, computed without all logits at once, and their checks."""

import functools
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.data.tokenizer import Tokenizer
from research.errors import UserError, nearest
from research.metrics import Mean, weighted
from research.task import Batch, Params, Spec
from research.tasks import cross_entropy
from research.tasks.cross_entropy import block_size, by_row, in_blocks, token_losses


def init(model: nn.Module, rng: jax.Array, spec: Spec, inputs: Sequence[str]) -> Params:
    """Return new float32 parameters of a model that is called with these features, None for those not in `spec`."""
    zeros = [jnp.zeros((1, *spec[name].shape[1:]), spec[name].dtype) if name in spec else None for name in inputs]
    return model.init(rng, *zeros)["params"]


def check(spec: Spec | Batch, needed: Sequence[str], most: int | None = None) -> None:
    """Raise UserError if a feature is missing, or if "input_ids" are longer than `most`, the model's positions."""
    for name in needed:
        if name not in spec:
            raise UserError(f"config.data.features: '{name}' is missing{nearest(name, spec)}")
    if most is not None and (length := spec["input_ids"].shape[1]) > most:
        raise UserError(
            f"config.data: rows of {length} tokens are longer than the {most} that the model has positions for"
        )


def hidden(
    model: nn.Module, params: Params, batch: Batch, inputs: Sequence[str], rngs: dict[str, jax.Array]
) -> jax.Array:
    """Return the hidden states [B, T, D] of a batch; the `inputs` that it lacks are None."""
    return jnp.asarray(
        model.apply({"params": params}, *[batch.get(name) for name in inputs], rngs=rngs, method="hidden")
    )


def logits(model: nn.Module, params: Params, hidden: jax.Array) -> jax.Array:
    """Return the logits float32 [..., V] of hidden states [..., D]."""
    return jnp.asarray(model.apply({"params": params}, hidden, method="logits"), jnp.float32)


def score(
    model: nn.Module,
    params: Params,
    hidden_BxTxD: jax.Array,
    batch: Batch,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    most: int | None = None,
) -> dict[str, Mean]:
    """Return the means over the targets that count: "loss", in nats, and "accuracy"; "bits_per_byte" where known.

    Args:
      model: its method `logits` maps [..., D] to [..., V].
      params: of the model.
      hidden_BxTxD: what it is applied to.
      batch: "targets" int [B, T], "target_mask" [B, T], "mask" [B], and perhaps "target_bytes" [B, T].
      label_smoothing: see `cross_entropy.token_losses`.
      z_loss: alike.
      chunk: positions of a row whose logits exist at once; 0 for all, None for as many as a device can hold.
      most: compute logits for that many positions of a row only, the first that count; None for all.
    """
    weights_BxT = batch["target_mask"] * batch["mask"][:, None]
    targets_BxT = batch["targets"]
    if most is not None and most < targets_BxT.shape[1]:
        chosen_BxN = jnp.argsort(-weights_BxT, axis=1)[:, :most]  # top_k would gather the batch on every device
        weights_BxT, targets_BxT = (jnp.take_along_axis(x, chosen_BxN, 1) for x in (weights_BxT, targets_BxT))
        hidden_BxTxD = jnp.take_along_axis(hidden_BxTxD, chosen_BxN[..., None], 1)

    def sums(params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        # In the dtype that they come in, unlike those of `logits`: see `cross_entropy.sums`.
        computed = jnp.asarray(model.apply({"params": params}, hidden, method="logits"))
        return cross_entropy.sums(computed, targets, weights, label_smoothing, z_loss)

    size = block(model, params, hidden_BxTxD, chunk)
    with jax.named_scope("loss"):
        loss, plain, correct = in_blocks(sums, size, params, hidden_BxTxD, targets_BxT, weights_BxT)
    count = weights_BxT.sum()
    means = {"loss": Mean(loss, count), "accuracy": Mean(correct, count)}
    if "target_bytes" in batch:
        bytes_ = (batch["target_bytes"] * weights_BxT).sum()
        means["bits_per_byte"] = Mean(plain / jnp.log(2.0), bytes_)
    return means


def log_likelihoods(
    model: nn.Module, params: Params, hidden_BxTxD: jax.Array, batch: Batch, chunk: int | None = None
) -> jax.Array:
    """Return the log-likelihood float32 [B] of each row's targets, in nats; see `score` for the arguments."""

    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        losses, _ = token_losses(logits(model, params, hidden), targets)
        return -weighted(losses, weights).sum(axis=1)

    with jax.named_scope("loss"):
        size = block(model, params, hidden_BxTxD, chunk)
        return by_row(sums, size, hidden_BxTxD, batch["targets"], batch["target_mask"])


def chosen_tokens(model: nn.Module, inputs: Sequence[jax.Array | None], choice: Mapping[str, jax.Array]) -> jax.Array:
    """Return the log-likelihoods float32 [B, P] of "tokens" int [P], each predicted at its own of "positions" int [P].

    See `Question.score`; the model has the methods `hidden` and `logits`.
    """
    hidden_BxPxD = model.hidden(*inputs)[:, choice["positions"]]
    log_BxPxV = jax.nn.log_softmax(model.logits(hidden_BxPxD).astype(jnp.float32))
    index = jnp.broadcast_to(choice["tokens"][None, :, None], (*log_BxPxV.shape[:2], 1))
    return jnp.take_along_axis(log_BxPxV, index, axis=-1)[..., 0]


def encode_target(tokenizer: Tokenizer | None, target: str) -> list[int]:
    """Return the token ids of a text that the user wants to be explained, or raise UserError."""
    if tokenizer is None:
        if not target.isdigit():
            raise UserError(f"--target: '{target}' is no token number, and the run has no tokenizer")
        return [int(target)]
    if target in tokenizer.special_tokens:
        return [tokenizer.backend.get_vocab(with_added_tokens=True)[target]]
    return [int(id) for id in tokenizer.backend.encode(target, add_special_tokens=False).ids]


def one_token(tokenizer: Tokenizer | None, target: str) -> int:
    """Return the id of the one token that a text is, or raise UserError."""
    ids = encode_target(tokenizer, target)
    if len(ids) != 1:
        names = [word(tokenizer, id) for id in ids]
        raise UserError(f"--target: '{target}' is {len(ids)} tokens, {names}; name one, such as --target='{names[0]}'")
    return ids[0]


def word(tokenizer: Tokenizer | None, id: int) -> str:
    """Return a token as text, or its number where there is no tokenizer."""
    if tokenizer is None:
        return str(id)
    text = tokenizer.decode([id], skip_special=False)
    return tokenizer.backend.id_to_token(id) or str(id) if not text or "\ufffd" in text else text


def block(model: nn.Module, params: Params, hidden_BxTxD: jax.Array, chunk: int | None) -> int:
    """Return how many positions of a row to compute the logits of at once; see `score`."""
    if chunk is None:
        every = jax.eval_shape(functools.partial(logits, model), params, hidden_BxTxD)
        return block_size(every.shape, hidden_BxTxD.dtype)
    return chunk or hidden_BxTxD.shape[1]
