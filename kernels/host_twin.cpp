// Operations without a kernel for CUDA: inputs are copied to the host, which waits for them, runs
// the twin and copies the results back. Results are the twin's, bit for bit.
#include <cstddef>
#include <vector>

#include "kernels/cuda_launchers.h"
#include "kernels/device_memory.h"

namespace perseid::kernels {
namespace {

/// What an array on the device holds, on the host. A null array has a null copy.
class HostInput {
 public:
  HostInput(const void* device, int64_t bytes, const Stream& stream)
      : bytes_(device == nullptr ? 0 : static_cast<size_t>(bytes)) {
    if (bytes_.empty()) return;
    copy_bytes(bytes_.data(), device, bytes, stream);
    synchronize(stream);
  }
  const void* data() const { return bytes_.empty() ? nullptr : bytes_.data(); }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data());
  }

 private:
  std::vector<std::byte> bytes_;
};

/// Room on the host for an array on the device. A null array has no room.
class HostOutput {
 public:
  HostOutput(void* device, int64_t bytes, const Stream& stream)
      : device_(device),
        stream_(stream),
        bytes_(device == nullptr ? 0 : static_cast<size_t>(bytes)) {}
  void* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
  template <typename T>
  T* as() {
    return static_cast<T*>(data());
  }
  /// Copies it to the array.
  void write() const {
    if (bytes_.empty()) return;
    copy_bytes(device_, bytes_.data(), static_cast<int64_t>(bytes_.size()), stream_);
    synchronize(stream_);
  }

 private:
  void* device_;
  Stream stream_;
  std::vector<std::byte> bytes_;
};

}  // namespace

namespace cuda {

void assign(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
            int32_t* column_of_row, const AssignmentDuals& duals, const Stream& stream) {
  const int64_t R = shape.num_rows, C = shape.num_columns;
  const HostInput costs(cost, R * C * int64_t{sizeof(double)}, stream);
  const HostInput capacities(capacity, C * int64_t{sizeof(int64_t)}, stream);
  HostOutput columns(column_of_row, R * int64_t{sizeof(int32_t)}, stream);
  HostOutput of_rows(duals.row, R * int64_t{sizeof(double)}, stream);
  HostOutput of_columns(duals.column, C * int64_t{sizeof(double)}, stream);
  kernels::assign(shape, costs.as<double>(), capacities.as<int64_t>(), columns.as<int32_t>(),
                  {of_rows.as<double>(), of_columns.as<double>()});
  for (const HostOutput* output : {&columns, &of_rows, &of_columns}) output->write();
}

void assign_balanced(const AssignmentShape& shape, DType dtype, const void* scores,
                     int32_t* column_of_row, const Stream& stream) {
  const int64_t R = shape.num_rows;
  const HostInput rows(scores, R * shape.num_columns * dtype_bytes(dtype), stream);
  HostOutput columns(column_of_row, R * int64_t{sizeof(int32_t)}, stream);
  kernels::assign_balanced(shape, dtype, rows.data(), columns.as<int32_t>());
  columns.write();
}

AtomCounts select_atoms(const AtomCells& cells, AtomOrder order, const float* scores,
                        const uint64_t* candidates, const int64_t* k, RandomKey key,
                        uint64_t* selected, const Stream& stream) {
  const int64_t bytes = num_mask_words(cells.num_atoms()) * int64_t{sizeof(uint64_t)};
  const HostInput values(scores, cells.num_atoms() * int64_t{sizeof(float)}, stream);
  const HostInput allowed(candidates, bytes, stream);
  const HostInput wanted(k, cells.num_cells * int64_t{sizeof(int64_t)}, stream);
  HostOutput result(selected, bytes, stream);
  const AtomCounts counts =
      kernels::select_atoms(cells, order, values.as<float>(), allowed.as<uint64_t>(),
                            wanted.as<int64_t>(), key, result.as<uint64_t>());
  result.write();
  return counts;
}

int64_t sinkhorn(const SinkhornShape& shape, const SinkhornOptions& options, DType dtype,
                 const void* logits, double* log_d1, const Stream& stream) {
  const int64_t T = shape.num_tokens, E = shape.num_experts;
  const HostInput rows(logits, T * E * dtype_bytes(dtype), stream);
  HostOutput result(log_d1, E * int64_t{sizeof(double)}, stream);
  const int64_t iterations =
      kernels::sinkhorn(shape, options, dtype, rows.data(), result.as<double>());
  result.write();
  return iterations;
}

void statistical_top_k(const StatisticalTopKShape& shape, const StatisticalTopKOptions& options,
                       DType dtype, const void* scores, const uint8_t* valid, void* weights,
                       int64_t* non_finite_tokens, const Stream& stream) {
  const int64_t T = shape.num_tokens, bytes = T * shape.num_experts * dtype_bytes(dtype);
  const HostInput rows(scores, bytes, stream), mask(valid, T, stream);
  HostOutput result(weights, bytes, stream);
  HostOutput non_finite(non_finite_tokens, int64_t{sizeof(int64_t)}, stream);
  kernels::statistical_top_k(shape, options, dtype, rows.data(), mask.as<uint8_t>(), result.data(),
                             non_finite.as<int64_t>());
  for (const HostOutput* output : {&result, &non_finite}) output->write();
}

void statistical_top_k_backward(const StatisticalTopKShape& shape,
                                const StatisticalTopKOptions& options, DType dtype,
                                const void* scores, const uint8_t* valid, const void* weights,
                                const void* grad_weights, void* grad_scores, const Stream& stream) {
  const int64_t T = shape.num_tokens, bytes = T * shape.num_experts * dtype_bytes(dtype);
  const HostInput rows(scores, bytes, stream), mask(valid, T, stream);
  const HostInput of_forward(weights, bytes, stream), grad(grad_weights, bytes, stream);
  HostOutput result(grad_scores, bytes, stream);
  kernels::statistical_top_k_backward(shape, options, dtype, rows.data(), mask.as<uint8_t>(),
                                      of_forward.data(), grad.data(), result.data());
  result.write();
}

}  // namespace cuda
}  // namespace perseid::kernels
