"""Faults of a kernel that no CPU shows, found in Triton's intermediate code."""

import re


def faults(source: str, gpu_code: str) -> str:
    """What is wrong with a kernel, given Triton IR before any pass and GPU IR after all; empty for
    nothing."""
    narrow, layouts = narrow_products(source), misadded(gpu_code)
    found = [f"multiplies in 32 bits: {', '.join(narrow)}"] if narrow else []
    return "; ".join(found + [f"adds up lanes {x}" for x in layouts])


def misadded(gpu_code: str) -> list[str]:
    """The layouts of tensors that are reduced along an axis which lanes apart from one another
    share, as `tl.reshape` may leave it: lanes whose numbers differ in one bit in between hold
    copies, or other rows.

    Triton 3.6 takes lanes along an axis for neighbours, so that some elements count twice and
    others not at all. Lanes are known of linear layouts, and of slices of these.
    """
    named = re.findall(r"^(#\w+) = #ttg\.linear<\{.*?lane = \[(.*)\], warp", gpu_code, re.M)
    linear = {name: re.findall(r"\[([\d, ]+)\]", lanes) for name, lanes in named}
    reduced = r'"tt\.reduce"\([^)]*\) <\{axis = (\d+) : i32\}>.*?\}\) : \(([^)]*)\)'
    found = set()
    for axis, operands in re.findall(reduced, gpu_code, re.S):
        for dropped, name in re.findall(
            r", ((?:#ttg\.slice<\{dim = \d, parent = )*)(#\w+)", operands
        ):
            lanes = [[int(n) for n in base.split(",")] for base in linear.get(name, [])]
            # The innermost slice is the first that was taken.
            for dim in reversed(re.findall(r"dim = (\d)", dropped)):
                for base in lanes:
                    del base[int(dim)]
            if _apart([bool(base[int(axis)]) for base in lanes]):
                found.add(f"{lanes}, along axis {axis}")
    return sorted(found)


def _apart(moves: list[bool]) -> bool:
    """Whether bits that move along an axis have others between them."""
    places = [place for place, moved in enumerate(moves) if moved]
    return bool(places) and places[-1] - places[0] >= len(places)


def narrow_products(source: str) -> list[str]:
    """The strides that a kernel multiplies in 32 bits, from its Triton IR as it is before any pass.

    Such a product overflows in tensors of more than 2^31 elements: of 64 heads of 128, laid out
    head by head, from 262,144 tokens on. The other factor has to be cast first, since that is what
    makes the product one of 64 bits.
    """
    spreading = r"%(\S+) = (?:tt\.splat|tt\.broadcast|tt\.expand_dims|ttg\.convert_layout) %(\w+)"
    product = r"= arith\.muli %(\w+), %(\w+) : (?:i32|tensor<[0-9x]*xi32)"
    found: set[str] = set()
    # Values in the present function that are a stride, or one repeated to a tensor, and its name.
    strides: dict[str, str] = {}
    for line in source.splitlines():
        if "tt.func" in line:
            strides = {name: name for name in re.findall(r"%(stride\w*): i32", line)}
            strides |= strides_of_bundles(line)
        elif match := re.search(spreading, line):
            if match[2] in strides:
                strides[match[1]] = strides[match[2]]
        elif match := re.search(product, line):
            found |= {strides[factor] for factor in match.groups() if factor in strides}
    return sorted(found)


def strides_of_bundles(function: str) -> dict[str, str]:
    """The strides that are members of bundles among a function's arguments,
    by their names in Triton IR.

    Triton numbers the members of a bundle after its name: of `q` the pointer is `%q`, and the
    strides are `%q_0` and `%q_1`. A bundle that begins with a pointer has no other integers.
    """
    bundle, begins_with = "", ""
    found: dict[str, str] = {}
    for name, kind in re.findall(r"%(\w+): (!tt\.ptr|\w+)", function):
        if not (bundle and re.fullmatch(rf"{bundle}_\d+", name)):
            bundle, begins_with = name, kind
        elif begins_with == "!tt.ptr" and kind == "i32":
            found[name] = f"{bundle}.stride"
    return found
