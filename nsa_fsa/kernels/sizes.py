"""Arithmetic of sizes on the host. Triton's own functions, made for kernels too, take 7 microseconds a call."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def padded_dim(dim: int) -> int:
    """The head width that a kernel computes with: a power of two, and at least what a matrix unit takes."""
    return max(next_power_of_2(dim), 16)
