"""nn.Modules: parameters, and the order in which the operators are called."""

from nsa_fsa.modules.compression import Compressor
from nsa_fsa.modules.explain import Choice, Explanation, explain
from nsa_fsa.modules.gating import BranchGate
from nsa_fsa.modules.native_sparse_attention import NativeSparseAttention

__all__ = ["BranchGate", "Choice", "Compressor", "Explanation", "NativeSparseAttention", "explain"]
