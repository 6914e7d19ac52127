"""What attention over windows is called with."""

from dataclasses import dataclass

from nsa_fsa.ops.common.calls import AttentionCall, Windows, check_compressed_values


@dataclass(frozen=True)
class WindowedCall(AttentionCall):
    """One call of compressed attention, or of the sliding window, whose windows are tokens."""

    windows: Windows
    # See only the last so many windows, which are single tokens then; None: all of the past.
    window_size: int | None

    def check_values(self) -> None:
        if self.window_size is None:
            check_compressed_values(self.q, self.k, self.sequences, self.windows.kernel_stride)
        else:
            super().check_values()
