"""What each FlashAttention can do, and how its heads are cut to a budget.

What they compute, the files of tests/ops/ test on a GPU, under the names of their backends.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa_fsa import ops
from nsa_fsa.ops.common import triton_backends
from nsa_fsa.ops.common.calls import WORKSPACE_BYTES, Windows
from nsa_fsa.ops.common.sizes import head_chunks
from nsa_fsa.ops.common.windowed_attention.call import WindowedCall
from nsa_fsa.ops.sliding_window_attention.flash_attention import (
    FLASH_ATTN_4,
    LIBRARIES,
    TORCH_FLASH,
    bytes_of_kv_head,
    output_and_dlse,
)
from nsa_fsa.sequences import Sequences
from tests.cases import BACKENDS, by_name, call, make_inputs


def window_call(
    dtype=torch.bfloat16,
    head_dim=128,
    v_head_dim=128,
    device="cuda",
    scale=0.1,
    num_tokens=64,
    num_sequences=2,
    cu_seqlens_q=None,
    seqused_k=None,
    backend="auto",
):
    """A call that takes no memory, and needs no GPU."""
    with FakeTensorMode():
        shapes = (num_tokens, 8, head_dim), (num_tokens, 2, head_dim), (num_tokens, 2, v_head_dim)
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        starts = torch.empty(num_sequences + 1, dtype=torch.int32, device=device)
    sequences = Sequences(starts, num_tokens, cu_seqlens_q, seqused_k)
    return WindowedCall(*tensors, sequences, scale, WORKSPACE_BYTES, backend, Windows(1, 1), 4)


USED = torch.tensor([3, 5], dtype=torch.int32)
LAST = torch.tensor([0, 1, 2], dtype=torch.int32)
BOTH = (FLASH_ATTN_4, TORCH_FLASH)
REFUSED = [
    (BOTH, dict(device="cpu"), {}, "q is on cpu, and FlashAttention runs on CUDA devices"),
    (
        BOTH,
        dict(dtype=torch.float32),
        {},
        "q has dtype torch.float32; supported are float16 and bfloat16",
    ),
    (BOTH, dict(head_dim=264), {}, "head widths 264 and 128; supported are at most 256"),
    (BOTH, dict(v_head_dim=288), {}, "head widths 128 and 288; supported are at most 256"),
    (BOTH, {}, dict(scale=-0.1), "scale=-0.1; it must be positive"),
    (BOTH, {}, dict(seqused_k=USED), "no support where seqused_k is given without cu_seqlens_q"),
    (
        (TORCH_FLASH,),
        dict(num_sequences=65_536),
        {},
        "65536 sequences; supported are at most 65535",
    ),
    (
        (FLASH_ATTN_4,),
        dict(num_tokens=5, cu_seqlens_q=LAST, seqused_k=USED),
        {},
        "5 queries with up to 6 keys of a cache before them in their sliding windows",
    ),
    (
        BOTH,
        {},
        dict(seqused_k=USED, cu_seqlens_q=LAST, backward=True),
        "no gradient where seqused_k is given",
    ),
]


@pytest.mark.parametrize(
    ("libraries", "made", "arguments", "reason"), REFUSED, ids=[row[3][:40] for row in REFUSED]
)
def test_says_what_cannot_run(libraries, made, arguments, reason):
    arguments = dict(arguments)
    backward = arguments.pop("backward", False)
    for library in libraries:
        assert reason in library.refuses(window_call(**made, **arguments), backward=backward)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_says_nothing_of_what_can(library):
    assert library.refuses(window_call(torch.float16, 80, 96), backward=True) is None
    assert library.refuses(window_call(head_dim=256, v_head_dim=8, cu_seqlens_q=LAST)) is None
    assert library.refuses(window_call(num_sequences=65_535)) is None
    few = 1 if library.stops_at_end else 6  # of two sequences with three keys before their queries
    assert library.refuses(window_call(num_tokens=few, cu_seqlens_q=LAST, seqused_k=USED)) is None


def test_any_library_that_can_will_do(monkeypatch):
    """With both there, decoding has one; where only flash-attn 4 is, none,
    and the reason is its own.
    """
    decoding = window_call(num_tokens=2, cu_seqlens_q=LAST, seqused_k=USED)
    fastest = BACKENDS["sliding_window_attention"].by_name["flash_attention"]
    for library in LIBRARIES:
        monkeypatch.setattr(library, "unavailable", lambda *_: None)
    assert fastest.refuses(decoding) is None
    monkeypatch.setattr(TORCH_FLASH, "unavailable", lambda *_: "it is not here")
    assert "reads past the keys in use" in fastest.refuses(decoding)


@pytest.mark.parametrize(
    ("num_tokens", "num_sequences", "decoding", "name"),
    [
        (1024 * 128, 1024, False, "triton_window"),
        (1024 * 128 + 1, 1024, False, "flash_attention"),
        (511, 511, False, "flash_attention"),  # too few to matter
        (1024, 1024, True, "flash_attention"),  # few queries of long caches
    ],
)
def test_many_short_sequences_are_left_to_triton(
    monkeypatch, num_tokens, num_sequences, decoding, name
):
    """In both passes, by "auto" alone: FlashAttention by name runs all the same."""
    for library in LIBRARIES:
        monkeypatch.setattr(library, "unavailable", lambda *_: None)
    monkeypatch.setattr(triton_backends, "_missing", lambda: None)
    monkeypatch.setattr(triton_backends, "interpreted", lambda: False)
    monkeypatch.setattr(triton_backends, "capability", lambda _: (9, 0))
    sizes = dict(
        num_tokens=num_tokens, num_sequences=num_sequences, cu_seqlens_q=LAST if decoding else None
    )
    for backward in (False, True):
        for asked, found in (("auto", name), ("flash_attention", "flash_attention")):
            asked_for = window_call(backend=asked, **sizes)
            assert (
                BACKENDS["sliding_window_attention"].choose(asked_for, backward=backward).name
                == found
            )


@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("heads_that_fit", [0, 1, 2, 5, 100])
def test_heads_are_cut_to_the_budget(num_kv_heads, group_size, heads_that_fit):
    # float32 sums of dq, and for a group of heads of dk and dv for every other one,
    # with 128 rows more for each of 3 sequences
    one_head = 4 * 16 * (100 + 3 * 128) * (2 * group_size if group_size > 1 else 1)
    assert bytes_of_kv_head(100, 100, group_size, 3, 16) == one_head
    chunks = list(
        head_chunks(num_kv_heads, group_size, one_head, max(heads_that_fit * one_head, 1))
    )
    assert [head for _, heads in chunks for head in range(num_kv_heads)[heads]] == list(
        range(num_kv_heads)
    )
    for of_queries, of_keys in chunks:
        assert of_queries == slice(of_keys.start * group_size, of_keys.stop * group_size)
        assert of_keys.stop - of_keys.start <= max(heads_that_fit, 1)
    assert len(chunks) == -(-num_kv_heads // max(heads_that_fit, 1))
    # No small one at the end.
    assert max(x.stop - x.start for _, x in chunks) == -(-num_kv_heads // len(chunks))


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_65536_tokens_of_32_heads_fit_the_default_budget(group_size):
    """In two parts PyTorch's backward takes a third longer, and its peak is hardly lower or
    even higher.
    """
    one_head = bytes_of_kv_head(2**16, 2**16, group_size, 1, 128)
    assert len(list(head_chunks(32 // group_size, group_size, one_head, WORKSPACE_BYTES))) == 1


def test_what_stands_for_an_output_that_is_not_read():
    """flash-attn 4 subtracts sum(o * do) - dlse, which must be delta either way."""
    o, do = torch.randn(2, 5, 3, 8).unbind()  # [T, HQ, DV]
    delta = (o * do).sum(-1).T  # [HQ, T]
    assert output_and_dlse(do, o, None) == (o, None)
    for known in (None, o):
        stand_in, dlse = output_and_dlse(do, known, delta)
        torch.testing.assert_close((stand_in * do).sum(-1).T - dlse, delta)


def test_without_a_gpu_a_library_is_refused_by_name():
    if torch.cuda.is_available():
        pytest.skip("this is about machines without a GPU")
    case = by_name("five")
    with pytest.raises(RuntimeError, match=r"backend='torch_flash' .*it needs a CUDA GPU.*Fix"):
        call("sliding_window_attention", case, make_inputs(case), "torch_flash")
    assert BACKENDS["sliding_window_attention"].available()["torch_flash"] == "it needs a CUDA GPU"
    x = make_inputs(case)
    assert (
        ops.sliding_window_attention(x.q, x.k, x.v, x.cu_seqlens, x.max_seqlen, window_size=3).shape
        == x.o_swa.shape
    )
