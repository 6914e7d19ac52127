"""What a call does on the device: its operations."""

from torch.utils._python_dispatch import TorchDispatchMode


class Recording(TorchDispatchMode):
    """The operations inside."""

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
