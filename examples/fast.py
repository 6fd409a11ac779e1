"""Faster forms of two models. Each gives the numbers of the plain form, which stands in the task's file."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

if TYPE_CHECKING:
    from .imdb import Classifier, State
    from .modular import Block, Decoder

# Suffixes name the axes: b example, l position, q position that is read out, m position that is attended to, d channel,
# h head or channel of an LSTM's state, k channel of a head, c key or value, n block of positions.
Cache = list[jax.Array]  # keys and values of earlier positions, block by block: (b, l, c, h, k)


def answer_logits(model: "Decoder", tokens_bl: jax.Array, *, prefixes: int) -> jax.Array:
    """The logits of `model(tokens_bl)[:, -1]`, (b, v), of examples whose first two tokens have few values.

    Nothing but the last position is read out, so the last block computes queries, MLP and head there alone. What comes
    first does not see what follows, so it is computed once for each value: the first token is below `prefixes`, and the
    second is the same in all examples. What the first block projects depends on token and position alone, so it is
    computed once for each pair of these.
    """
    first = jnp.arange(prefixes)
    _, cache = _decode(model, jnp.stack([first, jnp.broadcast_to(tokens_bl[0, 1], first.shape)], axis=-1))
    past = [kv_bmchk[tokens_bl[:, 0]] for kv_bmchk in cache]
    return _decode(model, tokens_bl[:, 2:], past)[0]


def _decode(model: "Decoder", tokens_bl: jax.Array, past: Cache | None = None) -> tuple[jax.Array, Cache]:
    """Logits of the token after the last position, and the cache with `past`, what came before."""
    first, length = past[0].shape[1] if past else 0, tokens_bl.shape[1]
    x_bld = model.token[...][:, None] + model.position[None, first : first + length]  # of every token, for the table
    cache = []
    for i, block in enumerate(model.blocks):
        readout = 1 if i == len(model.blocks) - 1 else length
        projected = _project(block, x_bld, readout if i else length)
        if i == 0:
            projected = jax.tree.map(lambda table: table[tokens_bl, jnp.arange(length)[None]], projected)
        x_bld, kv_bmchk = _block(block, projected, past[i] if past else None, readout)
        cache.append(kv_bmchk)
    return model.head(model.ln(x_bld[:, -1])), cache


class Projected(NamedTuple):
    """What a block's attention takes."""

    x_bld: jax.Array  # the normalised stream
    q_bqhk: jax.Array  # queries
    kv_blchk: jax.Array  # keys and values


def _project(block: "Block", x_bld: jax.Array, readout: int) -> Projected:
    """The projections of a stream, with queries at the last `readout` positions."""
    x_bld = block.ln1(x_bld)
    b, length, d = x_bld.shape
    per_head = (block.attention.heads, d // block.attention.heads)
    q_bqhk = _apply(block.attention.query, x_bld[:, -readout:]).reshape(b, readout, *per_head)
    return Projected(x_bld, q_bqhk, _apply(block.attention.key_value, x_bld).reshape(b, length, 2, *per_head))


def _block(block: "Block", projected: Projected, past: jax.Array | None, readout: int) -> tuple[jax.Array, jax.Array]:
    """The stream at the last `readout` positions, and the keys and values of all positions so far."""
    kv_bmchk = projected.kv_blchk if past is None else jnp.concatenate([past, projected.kv_blchk], axis=1)
    q_bqhk = projected.q_bqhk[:, -readout:]
    scores_bhqm = jnp.einsum("bqhk,bmhk->bhqm", q_bqhk, kv_bmchk[:, :, 0]) / q_bqhk.shape[-1] ** 0.5
    visible_qm = jnp.tril(jnp.ones((kv_bmchk.shape[1],) * 2, bool))[-readout:]
    weights_bhqm = jax.nn.softmax(jnp.where(visible_qm[None, None], scores_bhqm, -jnp.inf))
    y_bqhk = jnp.einsum("bhqm,bmhk->bqhk", weights_bhqm, kv_bmchk[:, :, 1])
    x_bqd = projected.x_bld[:, -readout:]
    x_bqd = x_bqd + _apply(block.attention.out, y_bqhk.reshape(x_bqd.shape))
    return x_bqd + _apply(block.down, _gelu(_apply(block.up, block.ln2(x_bqd)))), kv_bmchk


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU by erf, without the exponential that jax.nn.gelu's erfc takes to be exact far below 0, too."""
    return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


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
