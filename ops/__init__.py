"""Multi-scale deformable attention: one sampled, weighted sum per query and head.

Needs torch and nothing else: `from ddetr.ops import deform_attn` imports no other part of ddetr.
`ddetr.ops.reference` holds the same two functions in plain torch; it runs only when asked for by name.
"""

from .deform_attn import deform_attn, fused_deform_attn

__all__ = ["deform_attn", "fused_deform_attn"]
