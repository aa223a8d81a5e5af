#include <ATen/ATen.h>

#include <memory>

#include "examples/bench/kernel_bench.h"
#include "kernels/combine.h"
#include "kernels/permute.h"
#include "kernels/sort.h"
#include "moe/tensor_types.h"

namespace perseid::bench {
namespace {

/// The order of rows of a drawn routing, on the device.
struct Order {
  int64_t num_assignments = 0;
  int64_t num_experts = 0;
  kernels::Stream stream;
  at::Tensor keys;      ///< [A] int32, the expert of each assignment
  at::Tensor offsets;   ///< [E+1] int64
  at::Tensor order;     ///< [A] int32, the assignment of each sorted row
  at::Tensor token_of;  ///< [A] int32, the token of each sorted row
  at::Tensor place_of;  ///< [A] int32, the sorted row of each assignment

  void sort() const {
    kernels::counting_sort(keys.const_data_ptr<int32_t>(), num_assignments, num_experts,
                           offsets.mutable_data_ptr<int64_t>(), order.mutable_data_ptr<int32_t>(),
                           stream);
  }
};

Order make_order(const LayerCase& shape, const Place& place, uint64_t seed,
                 const std::string& operation) {
  const int64_t A = shape.num_assignments();
  const auto ints = at::TensorOptions(at::kInt).device(place.tensors());
  Order order;
  order.num_assignments = A;
  order.num_experts = shape.num_experts;
  order.stream = place.stream();
  order.keys = draw_routing(shape, seed).reshape(-1).to(place.tensors(), at::kInt);
  order.offsets = at::empty({shape.num_experts + 1}, ints.dtype(at::kLong));
  order.order = at::empty({A}, ints);
  order.sort();
  require_close(order.order, std::get<1>(order.keys.sort(true, 0, false)), 0, operation, "order");
  order.token_of = order.order.div(shape.top_k, "floor");
  order.place_of = at::empty({A}, ints).scatter(0, order.order.to(at::kLong), at::arange(A, ints));
  return order;
}

at::Tensor random_rows(int64_t rows, const LayerCase& shape, const Place& place) {
  return at::randn({rows, shape.d_model}, at::TensorOptions(at::kFloat).device(place.tensors()))
      .to(shape.dtype);
}

/// Bytes of T and of A rows.
struct RowBytes {
  explicit RowBytes(const LayerCase& shape)
      : tokens(static_cast<double>(shape.num_tokens * shape.d_model) *
               static_cast<double>(at::elementSize(shape.dtype))),
        assignments(tokens * static_cast<double>(shape.top_k)) {}
  double tokens, assignments;
};

// ---- permute ------------------------------------------------------------------------------------
struct Permute {
  Order order;
  at::Tensor tokens;      ///< [T, D]
  at::Tensor long_index;  ///< token_of as LibTorch wants it
  at::Tensor out, torch_out;

  void permute() const {
    kernels::permute(data_of(tokens), order.token_of.const_data_ptr<int32_t>(),
                     mutable_data_of(out), order.num_assignments,
                     tokens.size(1) * tokens.element_size(), order.stream);
  }
  void index_select() { at::index_select_out(torch_out, tokens, 0, long_index); }
};

// ---- combine ------------------------------------------------------------------------------------
struct Combine {
  Order order;
  int64_t num_tokens = 0, top_k = 0, width = 0;
  kernels::DType dtype = kernels::DType::kFloat32;
  at::Tensor rows;        ///< [A, D] in sorted order
  at::Tensor weights;     ///< [A] float32
  at::Tensor grad_out;    ///< [T, D]
  at::Tensor long_index;  ///< place_of as LibTorch wants it
  at::Tensor out, grad_rows, grad_weights;

  kernels::CombineIndex index() const {
    return {nullptr, top_k, order.place_of.const_data_ptr<int32_t>()};
  }
  void combine(bool weighted) const {
    kernels::combine(data_of(rows), index(), weighted ? data_of(weights) : nullptr, 1,
                     mutable_data_of(out), num_tokens, width, dtype, order.stream);
  }
  void combine_backward() const {
    kernels::combine_backward(data_of(grad_out), data_of(rows), index(), data_of(weights), 1,
                              mutable_data_of(grad_rows), mutable_data_of(grad_weights), num_tokens,
                              width, dtype, order.stream);
  }
  at::Tensor gathered() const {
    return rows.index_select(0, long_index).view({num_tokens, top_k, width});
  }
  at::Tensor torch_weights() const {  // [T, K, 1] in the type of the rows
    return weights.view({num_tokens, top_k, 1}).to(rows.scalar_type());
  }
  at::Tensor torch_combine(bool weighted) const {
    return weighted ? (gathered() * torch_weights()).sum(1) : gathered().sum(1);
  }
  /// [2]: of rows and of weights [T, K]
  std::vector<at::Tensor> torch_backward() const {
    const at::Tensor grad = grad_out.unsqueeze(1);
    return {at::empty_like(rows).index_copy_(
                0, long_index, (grad * torch_weights()).view({order.num_assignments, width})),
            (grad * gathered()).sum(2)};
  }
};

std::shared_ptr<Combine> make_combine(const LayerCase& shape, const Place& place, uint64_t seed) {
  const int64_t A = shape.num_assignments();
  const auto floats = at::TensorOptions(at::kFloat).device(place.tensors());
  auto combine = std::make_shared<Combine>();
  combine->order = make_order(shape, place, seed, "combine");
  at::manual_seed(seed);
  combine->num_tokens = shape.num_tokens;
  combine->top_k = shape.top_k;
  combine->width = shape.d_model;
  combine->rows = random_rows(A, shape, place);
  combine->dtype = dtype_of(combine->rows, "perseid-bench combine");
  combine->weights = at::rand({A}, floats);
  combine->grad_out = random_rows(shape.num_tokens, shape, place);
  combine->long_index = combine->order.place_of.to(at::kLong);
  combine->out = at::empty_like(combine->grad_out);
  combine->grad_rows = at::empty_like(combine->rows);
  combine->grad_weights = at::empty({A}, floats);
  return combine;
}

void check(const Combine& combine, double tolerance) {
  for (const bool weighted : {false, true}) {
    combine.combine(weighted);
    require_close(combine.out, combine.torch_combine(weighted), tolerance, "combine", "out");
  }
  combine.combine_backward();
  const std::vector<at::Tensor> grads = combine.torch_backward();
  require_close(combine.grad_rows, grads[0], tolerance, "combine", "grad_rows");
  require_close(combine.grad_weights, grads[1].reshape(-1), tolerance, "combine", "grad_weights");
}

}  // namespace

std::vector<Work> permute_works(const LayerCase& shape, const Place& place, uint64_t seed) {
  auto permute = std::make_shared<Permute>();
  permute->order = make_order(shape, place, seed, "permute");
  at::manual_seed(seed);
  permute->tokens = random_rows(shape.num_tokens, shape, place);
  permute->long_index = permute->order.token_of.to(at::kLong);
  permute->out = random_rows(shape.num_assignments(), shape, place);
  permute->torch_out = at::empty_like(permute->out);
  permute->permute();
  permute->index_select();
  require_close(permute->out, permute->torch_out, 0, "permute", "out");
  const RowBytes bytes(shape);
  const double sort_bytes = 8 * static_cast<double>(shape.num_assignments()) +
                            8 * static_cast<double>(shape.num_experts + 1);
  enum : size_t { kTorchSort = 1, kTorch = 3 };
  return {
      {"counting_sort", sort_bytes, 0, kTorchSort, [permute] { permute->order.sort(); }},
      {"stable sort", sort_bytes, 0, kTorchSort,
       [permute] { permute->order.keys.sort(true, 0, false); }},
      {"permute", bytes.tokens + bytes.assignments, 0, kTorch, [permute] { permute->permute(); }},
      {"index_select", bytes.tokens + bytes.assignments, 0, kTorch,
       [permute] { permute->index_select(); }}};
}

std::vector<Work> combine_works(const LayerCase& shape, const Place& place, uint64_t seed) {
  const std::shared_ptr<Combine> combine = make_combine(shape, place, seed);
  check(*combine, tolerance_of(shape.dtype));
  const RowBytes bytes(shape);
  const double forward = bytes.assignments + bytes.tokens;
  const double backward = bytes.tokens + 2 * bytes.assignments;
  const double elements = static_cast<double>(shape.num_assignments() * shape.d_model);
  enum : size_t { kTorch = 1, kTorchWeighted = 3, kTorchBackward = 5 };
  return {{"combine", forward, elements, kTorch, [combine] { combine->combine(false); }},
          {"index_select, sum", forward, elements, kTorch,
           [combine] { combine->torch_combine(false); }},
          {"combine, weighted", forward, 2 * elements, kTorchWeighted,
           [combine] { combine->combine(true); }},
          {"index_select, mul, sum", forward, 2 * elements, kTorchWeighted,
           [combine] { combine->torch_combine(true); }},
          {"combine_backward", backward, 3 * elements, kTorchBackward,
           [combine] { combine->combine_backward(); }},
          {"its transpose, LibTorch", backward, 3 * elements, kTorchBackward,
           [combine] { combine->torch_backward(); }}};
}

}  // namespace perseid::bench
