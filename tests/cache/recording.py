"""What a call does on the device: its operations, and those once more, as a CUDA graph has them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recording(TorchDispatchMode):
    """The operations inside, of which `replay` runs the same again: on the tensors of the first
    run, and with the numbers that the host had then."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @property
    def launches(self):
        """The names of those that do work: not of views, nor of what only the host is asked."""
        return [
            function.name()
            for function, _, _, result in self.operations
            if not function.is_view and function.name() != "aten::promote_types"
        ]

    @property
    def decodes(self):
        return "nsa_fsa::nsa_decode" in self.launches

    def replay(self):
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            pairs = [(result, again)] if isinstance(result, torch.Tensor) else []
            pairs = zip(result, again, strict=True) if isinstance(result, tuple) else pairs
            for old, new in pairs:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
