"""Faster forms of two models. Each gives the numbers of the plain form, which stands in the task's file."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

if TYPE_CHECKING:
    from .imdb import Classifier, State
    from .modular import Attention, Block, Decoder

# Suffixes name the axes: b example, l position, q position that is read out, m position that is attended to, d channel,
# h head or channel of an LSTM's state, k channel of a head, c key or value, f channel of the MLP, n block of positions.
Cache = list[jax.Array]  # keys and values of earlier positions, block by block: (b, l, c, h, k)


def answer_logits(model: "Decoder", tokens_bl: jax.Array, *, prefixes: int) -> jax.Array:
    """The logits of `model(tokens_bl)[:, -1]`, (b, v), of examples whose first two tokens have few values."""
    return answer_logits_and_neurons(model, tokens_bl, prefixes=prefixes)[0]


def answer_logits_and_neurons(model: "Decoder", tokens_bl: jax.Array, *, prefixes: int) -> tuple[jax.Array, jax.Array]:
    """The logits of `model(tokens_bl)[:, -1]`, (b, v), and the neurons of the last MLP that lead to them, (b, f).

    Nothing but the last position is read out, so the last block computes queries, MLP and head there alone. And what
    comes first does not see what follows, so it is computed once for each value: the first token is below `prefixes`,
    and the second is the same in all examples.
    """
    first = jnp.arange(prefixes)
    *_, cache = _decode(model, jnp.stack([first, jnp.broadcast_to(tokens_bl[0, 1], first.shape)], axis=-1))
    past = [kv_bmchk[tokens_bl[:, 0]] for kv_bmchk in cache]
    return _decode(model, tokens_bl[:, 2:], past)[:2]


def _decode(model: "Decoder", tokens_bl: jax.Array, past: Cache | None = None) -> tuple[jax.Array, jax.Array, Cache]:
    """Logits of the token after the last position, the neurons there, and the cache with `past`, what came before."""
    first = past[0].shape[1] if past else 0
    length = tokens_bl.shape[1]
    x_bld = model.token[...][tokens_bl] + model.position[None, first : first + length]
    cache, neurons = [], []
    for i, block in enumerate(model.blocks):
        readout = 1 if i == len(model.blocks) - 1 else length
        x_bld, neurons_bqf, kv_bmchk = _block(block, x_bld, past[i] if past else None, readout)
        neurons.append(neurons_bqf)
        cache.append(kv_bmchk)
    return model.head(model.ln(x_bld[:, -1])), neurons[-1][:, -1], cache


def _block(
    block: "Block", x_bld: jax.Array, past: jax.Array | None, readout: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stream and neurons at the last `readout` positions, and the keys and values of all positions so far."""
    x_bld = block.ln1(x_bld)
    y_bqd, kv_bmchk = _attention(block.attention, x_bld, past, readout)
    x_bqd = x_bld[:, -readout:] + y_bqd
    neurons_bqf = jax.nn.gelu(_apply(block.up, block.ln2(x_bqd)), approximate=False)
    return x_bqd + _apply(block.down, neurons_bqf), neurons_bqf, kv_bmchk


def _attention(
    attention: "Attention", x_bld: jax.Array, past: jax.Array | None, readout: int
) -> tuple[jax.Array, jax.Array]:
    """The output at the last `readout` positions, and the keys and values of all positions so far."""
    b, length, d = x_bld.shape
    heads = attention.heads
    kv_bmchk = _apply(attention.key_value, x_bld).reshape(b, length, 2, heads, d // heads)
    if past is not None:
        kv_bmchk = jnp.concatenate([past, kv_bmchk], axis=1)
    q_bqhk = _apply(attention.query, x_bld[:, -readout:]).reshape(b, readout, heads, d // heads)
    scores_bhqm = jnp.einsum("bqhk,bmhk->bhqm", q_bqhk, kv_bmchk[:, :, 0]) / q_bqhk.shape[-1] ** 0.5
    visible_qm = jnp.tril(jnp.ones((kv_bmchk.shape[1],) * 2, bool))[-readout:]
    weights_bhqm = jax.nn.softmax(jnp.where(visible_qm[None, None], scores_bhqm, -jnp.inf))
    y_bqhk = jnp.einsum("bhqm,bmhk->bqhk", weights_bhqm, kv_bmchk[:, :, 1])
    return _apply(attention.out, y_bqhk.reshape(b, readout, d)), kv_bmchk


def _apply(layer: nnx.Linear, x_bld: jax.Array) -> jax.Array:
    """A linear layer over all positions as one matrix product; the gradient of a batched one is slow on XLA's CPU."""
    return layer(x_bld.reshape(-1, x_bld.shape[-1])).reshape(*x_bld.shape[:-1], -1)


def padded_logits(model: "Classifier", tokens_bl: jax.Array, *, block: int = 20) -> jax.Array:
    """The logits of `model(tokens_bl)`, (b,), of reviews that are padded with 0 on the left; `block` divides l.

    Most positions are padding, and reviews of which only padding was seen so far share one state. So the positions are
    gone through block by block, the longest reviews first. A block is computed for the reviews that have words there
    and one more, which stands for all the rest. Static shapes allow a few numbers of reviews.
    """
    b = tokens_bl.shape[0]
    longest_first = jnp.argsort(-jnp.count_nonzero(tokens_bl, axis=1))
    blocks_nlb = tokens_bl[longest_first].T.reshape(-1, block, b)
    sizes = sorted({1, b // 12, b // 4, b // 2, b} - {0})

    # Kept for the backward pass: the states between the blocks. The rest is computed again.
    @functools.partial(jax.checkpoint, static_argnums=0)
    def advance(size: int, states: "list[State]", tokens_lb: jax.Array) -> "list[State]":
        x_lbd = model.embedding[...][tokens_lb[:, :size]]
        new = []
        for layer, state in zip(model.layers, states, strict=True):
            state, x_lbd = layer(jax.tree.map(lambda s_bh: s_bh[:size], state), x_lbd)
            new.append(state)
        rest = lambda s_bh: jnp.broadcast_to(s_bh[-1:], (b - size, model.hidden))
        return jax.tree.map(lambda s_bh: jnp.concatenate([s_bh, rest(s_bh)]), new)

    def step(states: "list[State]", tokens_lb: jax.Array) -> "tuple[list[State], None]":
        with_words = jnp.count_nonzero(tokens_lb[-1])
        enough = jnp.searchsorted(jnp.array(sizes[:-1]), with_words + 1)
        return lax.switch(enough, [functools.partial(advance, size) for size in sizes], states, tokens_lb), None

    states, _ = lax.scan(step, model.zero_states(b), blocks_nlb)
    return jnp.zeros_like(states[-1][0][:, 0]).at[longest_first].set(model.head(states[-1][0])[:, 0])
