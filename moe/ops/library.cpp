// torch.ops.load_library("libperseid_ops.so") runs the initialisers of this file, which register
// operations and do nothing else: no MPI, no CUDA, no thread.
#include <torch/library.h>

#include "moe/ops/gate_op.h"
#include "moe/ops/grouped_mlp_op.h"
#include "moe/ops/movement_ops.h"

TORCH_LIBRARY(perseid, library) {
  perseid::ops::define_gates(library);
  perseid::ops::define_movement(library);
  perseid::ops::define_grouped_mlp(library);
}

TORCH_LIBRARY_IMPL(perseid, CPU, library) {
  perseid::ops::implement_gates_on_cpu(library);
  perseid::ops::implement_movement_on_cpu(library);
  perseid::ops::implement_grouped_mlp_on_cpu(library);
}

TORCH_LIBRARY_IMPL(perseid, Meta, library) {
  perseid::ops::implement_gates_on_meta(library);
  perseid::ops::implement_movement_on_meta(library);
  perseid::ops::implement_grouped_mlp_on_meta(library);
}

TORCH_LIBRARY_IMPL(perseid, Autograd, library) {
  perseid::ops::implement_gates_autograd(library);
  perseid::ops::implement_movement_autograd(library);
  perseid::ops::implement_grouped_mlp_autograd(library);
}
