// Schema and registrations of the CPU operators; nothing else.
#include "cpu.h"
#include "operators.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ddetr, library) {
  library.def(
      "deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  library.def(
      "deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  library.def(
      "fused_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits) -> Tensor");
  library.def(
      "fused_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, bool needs_reference_gradient)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("cpu_capability(str limit) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ddetr, CPU, library) {
  using Operators = ddetr::Operators<ddetr::cpu::Device>;
  library.impl("deform_attn", TORCH_BOX(&Operators::deform_attn));
  library.impl("deform_attn_backward", TORCH_BOX(&Operators::deform_attn_backward));
  library.impl("fused_deform_attn", TORCH_BOX(&Operators::fused_deform_attn));
  library.impl("fused_deform_attn_backward", TORCH_BOX(&Operators::fused_deform_attn_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ddetr, CompositeExplicitAutograd, library) {
  library.impl("cpu_capability", TORCH_BOX(&ddetr::cpu::capability));
}
