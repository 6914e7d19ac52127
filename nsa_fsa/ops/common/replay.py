"""Runs an operator again without deciding again.

What an operator allocates and launches follows from the shapes, strides, dtypes and numbers that it
is given, and never from what its tensors hold: nothing is read back from the device. So the second
call of a kind is taken down as a tape, a Python function that does just that with other tensors,
and every later call plays it. Checks, choices of backends and tiles, views and descriptions of
arguments are then done with.

A tape repeats what went through PyTorch's dispatcher, through our launcher of kernels, or through
`opaque`. What cannot be repeated, such as a number read back, refuses the tape, and the operator
runs as it is written. NSA_FSA_REPLAY=0 turns all of it off.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

MAX_TAPES = 4096
ALIGNMENT = 512  # bytes, of what shares an allocation; PyTorch's allocator aligns its blocks so

Play = Callable[[list[Tensor], list[int]], Any]  # of input tensors and their addresses


class Made(NamedTuple):
    """A step that makes an uninitialised tensor, `t<number>`, whose address is `a<number>`."""

    number: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """What it takes of a shared allocation."""
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        elements = last + 1 if prod(self.size) else 0
        return -(-elements * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Done(NamedTuple):
    """A step that is a line of Python."""

    line: str
    used: tuple[int, ...]  # the tensors that it reads or writes


class Recorder(TorchDispatchMode):
    """Takes down what runs inside it, and makes a tape of it.

    In a tape `t0`, `t1` and so on are tensors, the inputs first, `a0`, `a1` their addresses, and
    `c0`, `c1` constants.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.steps: list[Made | Done] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # of the constants, by their ids
        self.asked: dict[str, str] = {}  # names by the expressions that they stand for
        self.refusal: str | None = None
        self.num_inputs, self.device = len(inputs), inputs[0].device
        self.known = [(x.data_ptr(), x.shape, x.stride()) for x in inputs]
        self.dtypes = [x.dtype for x in inputs]
        self.numbers: dict[int, list[int]] = {}  # by storage: the tensors that lie there
        # Until the end no other storage gets the address of one that is gone.
        self.storages = [StorageWeakRef(x.untyped_storage()) for x in inputs]
        for number, x in enumerate(inputs):
            self.numbers.setdefault(_storage(x), []).append(number)
        self.used: set[int] = set()  # by the step that is being taken down
        self.needed: set[int] = set()  # as tensors and not just by their addresses
        self.inside_opaque = False

    # What runs

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not self.inside_opaque and self.refusal is None:
            self._take_down(function, args, kwargs or {}, found)
        return found

    def _take_down(self, function: Any, args: Any, kwargs: Any, found: Any) -> None:
        name = function.name()
        # Numbers on a CPU are read without the dispatcher. FlashAttention's seed is not read.
        elsewhere = [x.device for x in tensors_in(found) if x.device != self.device]
        if elsewhere and not name.startswith("aten::_flash_attention"):
            self.refuse(f"{function} has a result on {elsewhere[0]}")
        elif torch.Tag.data_dependent_output in function.tags or (
            torch.Tag.dynamic_output_shape in function.tags
        ):
            self.refuse(f"{function} reads back what a tensor holds")
        elif name.startswith(("aten::empty", "aten::new_empty")):
            number = self._make(found)
            self.steps.append(Made(number, found.shape, found.stride(), found.dtype, found.device))
        else:
            self.call(function, args, kwargs, found, function._schema.is_mutable)

    def call(
        self, function: Any, args: Any, kwargs: Any, found: Any, is_mutable: bool = True
    ) -> None:
        """Takes down a call, unless it does nothing but view a tensor: each step finds its own."""
        given = {_storage(x) for x in tensors_in((args, kwargs))}
        returned = tensors_in(found)
        made = [number for number, x in enumerate(returned) if _storage(x) not in given]
        if not (is_mutable or made):
            return
        inputs = [self.expression(x) for x in args]
        inputs += [f"{name}={self.expression(x)}" for name, x in kwargs.items()]
        line = f"{self.constant(function)}({', '.join(inputs)})"
        new = {self._make(returned[place]): place for place in made}
        if new:
            line = f"x = {self.constant(tensors_in)}({line})"
            line += "".join(
                f"; t{n} = x[{place}]; a{n} = t{n}.data_ptr()" for n, place in new.items()
            )
            line += "; del x"
        self.needed.update(new)
        self.do(line, *new)

    def once(self, expression: str) -> str:
        """A name for a value that a tape asks for once, before all else."""
        return self.asked.setdefault(expression, f"x{len(self.asked)}")

    def do(self, line: str, *made: int) -> None:
        """Takes down a line of Python, made of expressions and addresses from here."""
        self.steps.append(Done(line, (*self.used, *made)))
        self.used.clear()

    def refuse(self, reason: str) -> None:
        """No tape is made of what runs, for this reason."""
        self.refusal = self.refusal or reason

    # How it is written

    def constant(self, x: Any) -> str:
        """What stands for a value that is the same each time."""
        if x is None or type(x) in (int, bool):
            return repr(x)
        if tensors_in(x):
            self.refuse("a tensor is where none was expected")
        if id(x) not in self.names:
            self.names[id(x)] = f"c{len(self.constants)}"
            self.constants[self.names[id(x)]] = x
        return self.names[id(x)]

    def expression(self, x: Any) -> str:
        """What stands for an argument that may be, or hold, tensors."""
        if isinstance(x, Tensor):
            return self._view(x)
        if not tensors_in(x):
            return self.constant(x)
        if isinstance(x, dict):
            return f"{{{', '.join(f'{key!r}: {self.expression(y)}' for key, y in x.items())}}}"
        members = ", ".join(map(self.expression, x))
        if isinstance(x, tuple):
            kind = f"{self.constant(type(x)._make)}(" if hasattr(x, "_make") else "("
            return f"{kind}({members},))"
        return f"[{members}]"

    def address(self, x: Tensor) -> str:
        """What stands for where a tensor begins in memory."""
        number, offset = self._place(x)
        return f"a{number} + {offset}" if offset else f"a{number}"

    def _view(self, x: Tensor) -> str:
        number, offset = self._place(x)
        self.needed.add(number)
        if self.dtypes[number] != x.dtype:
            self.refuse(f"a tensor of {self.dtypes[number]} is read as {x.dtype}")
        if self.known[number] == (x.data_ptr(), x.shape, x.stride()):
            return f"t{number}"
        start = f"t{number}.storage_offset() + {offset // x.element_size()}"
        return f"t{number}.as_strided({tuple(x.shape)}, {x.stride()}, {start})"

    def _make(self, x: Tensor) -> int:
        number = len(self.known)
        self.numbers[_storage(x)] = [number]
        self.storages.append(StorageWeakRef(x.untyped_storage()))
        self.known.append((x.data_ptr(), x.shape, x.stride()))
        self.dtypes.append(x.dtype)
        return number

    def _place(self, x: Tensor) -> tuple[int, int]:
        """In which tensor x lies, and how many bytes behind where that one begins."""
        start, numbers = x.data_ptr(), self.numbers.get(_storage(x), [])
        if len(numbers) > 1:  # what begins elsewhere could be a part of any of them
            numbers = [n for n in numbers if self.known[n][0] == start][:1]
        if not numbers:
            self.refuse(f"a tensor of shape {tuple(x.shape)} came from elsewhere")
            return 0, 0
        (number,) = numbers
        self.used.add(number)
        return number, start - self.known[number][0] if x.numel() else 0

    # The tape

    def tape(self, name: str, found: Any) -> Play | None:
        """A function that does what was taken down, of an operator that returned `found`."""
        results = [self._view(x) for x in tensors_in(found)]
        returned, self.used = self.used, set()
        if self.refusal is not None:
            return None
        inputs = range(self.num_inputs)
        lines = [f"{''.join(f't{n}, ' for n in inputs)} = tensors"]
        lines += [f"{''.join(f'a{n}, ' for n in inputs)} = addresses"]
        body = [*self._body(returned)]
        lines += [f"{name} = {expression}" for expression, name in self.asked.items()]
        lines += body
        several = "," if isinstance(found, tuple) else ""
        lines.append(f"return {', '.join(results)}{several}")
        source = "\n    ".join(["def play(tensors, addresses):", *lines])

        namespace = {"empty": torch.empty_strided, **self.constants}
        exec(compile(source, f"<tape of {name}>", "exec"), namespace)
        namespace["play"].source = source
        return namespace["play"]

    def _body(self, returned: set[int]) -> Iterator[str]:
        groups = list(self._allocations(returned))
        last: dict[int, int] = {}  # by tensor: the group that needs it last
        owner: dict[int, int] = {}  # by tensor: the one whose memory it shares
        for at, group in enumerate(groups):
            if isinstance(group, Done):
                last.update((owner.get(n, n), at) for n in group.used)
            else:
                owner.update((made.number, group[0].number) for made in group)

        for at, group in enumerate(groups):
            yield from [group.line] if isinstance(group, Done) else self._allocate(group)
            gone = [n for n, x in last.items() if x == at and n not in returned]
            if gone := [n for n in gone if n >= self.num_inputs]:
                yield f"del {', '.join(f't{n}' for n in gone)}"

    def _allocations(self, returned: set[int]) -> Iterator[list[Made] | Done]:
        """The steps, where successive tensors of which only kernels know are one allocation."""
        shared: list[Made] = []
        for step in self.steps:
            if isinstance(step, Made) and step.number not in self.needed | returned:
                shared.append(step)
                continue
            if shared and isinstance(step, Done):
                yield shared
                shared = []
            yield [step] if isinstance(step, Made) else step

    def _allocate(self, group: list[Made]) -> Iterator[str]:
        first = group[0].number
        if len(group) == 1:
            _, size, stride, dtype, device = group[0]
            options = f"dtype={self.constant(dtype)}, device={self.constant(device)}"
            yield f"t{first} = empty({tuple(size)}, {stride}, {options})"
        else:
            total = sum(made.num_bytes for made in group)
            options = f"dtype={self.constant(torch.uint8)}, device={self.constant(group[0].device)}"
            yield f"t{first} = empty(({total},), (1,), {options})"
        yield f"a{first} = t{first}.data_ptr()"
        start = group[0].num_bytes
        for made in group[1:]:
            yield f"a{made.number} = a{first} + {start}"
            start += made.num_bytes


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


RECORDER: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def refuse(reason: str) -> None:
    """Says that what runs now is not to be repeated, where a tape is made of it."""
    if (recorder := RECORDER.get()) is not None:
        recorder.refuse(reason)


def opaque(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of another library, which launches kernels by ways of its own: repeated as a whole."""
    recorder = RECORDER.get()
    if recorder is None or recorder.inside_opaque:
        return function(*args, **kwargs)
    recorder.inside_opaque = True
    try:
        found = function(*args, **kwargs)
    finally:
        recorder.inside_opaque = False
    recorder.call(function, args, kwargs, found)
    return found


_LOCK = threading.Lock()
SEEN, REFUSED = "seen", "refused"
TAPES: dict[Any, Any] = {}  # by the kind of a call: one of these two, or its tape
ENABLED = os.environ.get("NSA_FSA_REPLAY", "1") != "0"
AVOIDED_FOR: list[Callable[[], Any]] = []  # nothing is repeated while one of these is true


def applies(x: Tensor) -> bool:
    """Whether operators on this tensor's device are repeated: on a CPU they look at values."""
    return ENABLED and x.is_cuda and not any(reason() for reason in AVOIDED_FOR)


def replayed(name: str, row: Sequence[Any], run: Callable[[], Any]) -> Any:
    """What `run` returns, which runs the operator `name` for a row of tensors and numbers."""
    if not applies(row[0]):
        return run()
    inputs, addresses = [], []
    kind: list[Any] = [name, row[0].device, *_surroundings()]
    for x in row:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            kind += (x.dtype, x.shape, x.stride(), address % 16)
            inputs.append(x)
            addresses.append(address)
        else:
            kind.append(tuple(x) if isinstance(x, list) else x)
    key = (*kind, *between(inputs, addresses))

    tape = TAPES.get(key)
    if callable(tape):
        return tape(inputs, addresses)
    if tape is None:
        with _LOCK:
            if len(TAPES) >= MAX_TAPES:
                del TAPES[next(iter(TAPES))]
            TAPES[key] = SEEN
    if tape is not SEEN:
        return run()

    recorder = Recorder(inputs)
    token = RECORDER.set(recorder)
    try:
        with recorder:
            found = run()
    finally:
        RECORDER.reset(token)
    TAPES[key] = recorder.tape(name, found) or REFUSED
    return found


def between(inputs: Sequence[Tensor], addresses: Sequence[int]) -> Iterator[tuple[int, int]]:
    """How tensors lie in memory that they share: with which one, and how far behind it.

    Where a part of one begins as another does, a tape cannot tell them apart, and is good only for
    tensors that lie alike: of lengths that are `cu_seqlens[1:]` it would make others part of
    cu_seqlens.
    """
    storages = [_storage(x) for x in inputs]
    for storage, address in zip(storages, addresses, strict=True):
        number = storages.index(storage)
        yield number, address - addresses[number]


def _surroundings() -> tuple[Any, ...]:
    """What beside its arguments an operator's choices depend on."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,
        os.environ.get("NSA_FSA_PROFILE"),
    )
