"""What the oracles of both conventions share: one query over one list of keys,
and the comparison of output and gradients.
"""

import torch
from torch.testing import assert_close

# Both sides compute in float64, on values of order 1 and sums of at most 100 terms:
# what remains is rounding.
EXACT = dict(rtol=1e-10, atol=1e-10)


def attend(query, keys, values, scale):
    """query `[D]`, keys `[n, D]`, values `[n, DV]` -> softmax-weighted values `[DV]` and the
    weights `[n]`; 0 for no keys.
    """
    if len(keys) == 0:
        return values.new_zeros(values.shape[1]), values.new_zeros(0)
    scores = scale * (keys * query).sum(1)
    weights = (scores - scores.max()).exp()
    weights = weights / weights.sum()
    return (weights[:, None] * values).sum(0), weights


def keys_of_blocks(blocks, block_size, t):
    """Positions up to t in the chosen blocks, each once, whatever numbers stand
    among the blocks.
    """
    return [p for p in range(t + 1) if p // block_size in blocks]


def leaves(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def assert_same(actual, expected, inputs):
    """Outputs are equal, and so are their gradients with respect to every input."""
    assert_close(actual, expected, **EXACT)
    do = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad(o, inputs, do, allow_unused=True, materialize_grads=True)
        for o in (actual, expected)
    ]
    for n, (got, wanted) in enumerate(zip(*gradients, strict=True)):
        assert_close(
            got, wanted, **EXACT, msg=lambda message, n=n: f"gradient of input {n}: {message}"
        )
