"""Figures quoted from the FSA paper (https://arxiv.org/abs/2508.18224), beside which ours are printed."""

# Table 5, "Profiled Buffer Overhead": GB, head width 128, H200. The paper does not say at which group size.
TABLE_5_SOURCE = "FSA paper (arXiv:2508.18224), appendix E, table 5; quoted, not measured here"
TABLE_5 = {
    (64, 16): {32768: 0.52, 65536: 1.88, 131072: 5.01, 262144: 12.36},
    (128, 8): {32768: 0.26, 65536: 0.91, 131072: 2.28, 262144: 6.15},
}
# Section 4.4: how much slower FSA's selected attention gets without each of its optimisations (figure 9).
FIGURE_9_SOURCE = "FSA paper (arXiv:2508.18224), section 4.4, about figure 9; quoted, not measured here"
FIGURE_9 = {
    "without the inner loop": "drops by up to 18.9%, on average 11.9%",
    "without early return": "drops by up to 25.2%, on average 18.2%",
}
# Table 7, "H200 GPU, Inference Prefill and Training Latency": seconds; head width 128, 64 query heads. By blocks, group size
# and tokens: forward of FSA, of NSA and of full attention, then forward and backward of each.
TABLE_7_SOURCE = "FSA paper (arXiv:2508.18224), appendix F.1, table 7; quoted, not measured here"
TABLE_7 = {
    ((64, 16), 1, 131072): (0.78, 1.01, 1.01, 1.12, 2.17, 4.70),
    ((64, 16), 1, 262144): (3.92, 3.97, 3.96, 4.81, 6.99, 18.75),
    ((64, 16), 2, 131072): (0.46, 0.57, 0.98, 0.80, 1.24, 4.68),
    ((64, 16), 2, 262144): (2.14, 2.17, 3.98, 3.04, 4.12, 18.77),
    ((64, 16), 4, 131072): (0.27, 0.33, 0.99, 0.60, 0.82, 4.71),
    ((64, 16), 4, 262144): (1.20, 1.29, 3.99, 2.15, 2.70, 18.76),
    ((64, 16), 8, 131072): (0.18, 0.18, 0.97, 0.50, 0.52, 4.67),
    ((64, 16), 8, 262144): (0.73, 0.73, 3.97, 1.72, 2.01, 18.78),
    ((128, 8), 1, 131072): (0.65, 1.20, 1.00, 0.97, 2.47, 4.70),
    ((128, 8), 1, 262144): (3.16, 4.10, 3.96, 3.99, 6.79, 18.75),
    ((128, 8), 2, 131072): (0.38, 0.66, 0.98, 0.70, 1.40, 4.68),
    ((128, 8), 2, 262144): (1.76, 2.21, 3.99, 2.58, 3.90, 18.77),
    ((128, 8), 4, 131072): (0.21, 0.28, 0.99, 0.53, 0.73, 4.71),
    ((128, 8), 4, 262144): (1.06, 1.24, 3.97, 1.87, 2.44, 18.76),
    ((128, 8), 8, 131072): (0.17, 0.20, 0.97, 0.48, 0.58, 4.67),
    ((128, 8), 8, 262144): (0.71, 0.75, 3.95, 1.52, 1.70, 18.78),
}


def table_7(blocks: tuple[int, int], group_size: int, num_tokens: int, name: str) -> dict[str, float] | None:
    """Seconds of FSA, NSA and full attention (`fsa`, `nsa`, `full`) in one pass, or None where the table has none."""
    row = TABLE_7.get((blocks, group_size, num_tokens))
    if row is None or name not in ("forward", "forward_backward"):
        return None
    return dict(zip(("fsa", "nsa", "full"), row[:3] if name == "forward" else row[3:], strict=True))
