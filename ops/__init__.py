"""Multi-scale deformable attention: one sampled, weighted sum per query and head.

`from ddetr.ops import deform_attn` imports torch, and neither another package nor another part of ddetr. A call
needs the binary that a C++20 compiler builds (docs/op.md, building).
`ddetr.ops.reference` holds the same two functions in plain torch; it runs only when asked for by name.
"""

from .deform_attn import deform_attn, fused_deform_attn

__all__ = ["deform_attn", "fused_deform_attn"]
