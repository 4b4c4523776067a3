"""Delta rule: a matrix state in which each key's old value is erased as the new one is written. See `delta_rule`."""

import jax.numpy as jnp
import numpy as np

from attnx.ops import chunks, parallel
from pallas_kernels.kept import kept_once


def delta_rule(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
    impl='auto',
):
    """The (gated) delta rule, the core of DeltaNet, Gated DeltaNet and KDA.

        S' = exp(g_t) S_{t-1}        S_t = S' + beta_t k_t^T (v_t - k_t S')        o_t = scale q_t S_t

    The prediction error is taken against the decayed state. Keys are taken as given: for a stable recurrence normalise
    them to |k| <= 1, with beta in [0, 2].

    Args:
      query: [B, T, K, H]; K divides N, and query and key head n // (N/K) serves value head n without being copied.
      key: [B, T, K, H].
      value: [B, T, N, Hv], N heads.
      beta: write strength [B, T, N], in [0, 2]: 0 writes nothing, 1 replaces, 2 reflects.
      log_decay: g <= 0, natural log: None (no decay), [N] constant per head, [B, T, N] per token, or [B, T, N, H] per
        token and key channel. -inf erases. Exact to rounding for any size of decay.
      initial_state: S before the first token, [B, N, H, Hv]; None is zero.
      segment_ids: integers [B, T]; the state is zero before a token whose id differs from the token before. The first
        token continues `initial_state` whatever its id.
      scale: factor on the query; None is 1 (mechanisms that want H^-0.5 say so).
      chunk: tokens solved for all at once in the chunked form, a power of two; None chooses by shape. No effect on the
        result beyond rounding.
      precision: None, or 'highest': the last state and gradients of 32 bits as good as float32 makes them of these inputs. By
        themselves kernels multiply what they compute as two 16-bit terms, which is faster and up to 7e-5 off. 'reference'
        and 'xla' are float32 whichever is asked for.
      impl: 'auto', 'reference' (token by token), 'xla' (chunked), or a kernel. Both forms have forward-mode and
        second-order derivatives.

    Returns:
      out [B, T, N, Hv] in value's dtype, and the state after the last token [B, N, H, Hv] in float32 (float64 for
      float64 inputs).

    Raises:
      ValueError: a rank, shape or dtype is not the one above; chunk is not a power of two; log_decay is known to be
        positive, or beta to be outside [0, 2]; precision is none of these.

    Memory: O(T), forward and backward. Paper: 2406.06484, 2412.06464.
    """
    arrays = query, key, value, log_decay, initial_state, segment_ids
    chunks.require_recurrence('delta_rule', *arrays, scale, chunk, precision)
    sizes = dict(zip('BTN', value.shape))
    chunks.require_shape('delta_rule', 'beta', beta, 'B T N', sizes)
    chunks.require_range('delta_rule', 'beta', beta, 0, 2 + 1e-3, 'beyond it a unit key makes the state grow')
    forms = {'reference': reference, 'xla': xla}
    options = {'initial_state': initial_state, 'segment_ids': segment_ids, 'scale': scale}
    options |= {'chunk': chunk, 'precision': precision}
    out, state = parallel.run('delta_rule', impl, forms, (query, key, value, beta, log_decay), options)
    return kept_once(out), state


def reference(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
):
    """The definition, token by token."""
    del chunk, precision

    def update(state, key, value, beta):
        error = value - jnp.einsum('bnh,bnhv->bnv', key, state, precision='highest')
        return state + key[..., :, None] * (beta[..., None] * error)[..., None, :]

    return chunks.step_by_step(update, query, key, value, beta, log_decay, initial_state, segment_ids, scale)


def xla(
    query,
    key,
    value,
    beta,
    log_decay=None,
    *,
    initial_state=None,
    segment_ids=None,
    scale=None,
    chunk=None,
    precision=None,
):
    """Chunk by chunk: what each token writes, U, of all tokens at once, then the gated linear recurrence with U for V.

    (I + A) U = diag(beta) (V - K S), S the chunk's first state as each token finds it; A_ij = beta_i k_i . k_j, decayed
    from j to i, for j < i.
    """
    del precision  # it is float32
    if value.shape[1] == 1:
        return reference(query, key, value, beta, log_decay, initial_state=initial_state, scale=scale)

    def body(state, query, span, value, beta):
        query, beta = query if scale is None else scale * query, beta[..., None]
        length = value.shape[-2]
        strict = np.tril(np.ones((length, length), bool), -1)
        coupling = jnp.where(strict, beta * span.products(span.key), 0)
        written = chunks.unit_lower_solve(coupling, beta * (value - span.read(span.key, state)))
        out = chunks.matmul(span.products(query), written) + span.read(query, state)
        return span.write(written, state), out

    size = chunks.size(chunk, key, value, log_decay)
    return chunks.scan(body, query, key, value, beta, log_decay, initial_state, segment_ids, size)
