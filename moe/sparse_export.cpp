#include "moe/sparse_export.h"

#include <ATen/core/ivalue.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "kernels/block_product.h"
#include "kernels/csr_product.h"
#include "kernels/error.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kSparseExport = "sparse_export";
constexpr int64_t kMaxShortColumns = 65536;

/// Active positions in row order: the columns of each row.
struct RowEntries {
  std::vector<int32_t> offsets;
  std::vector<int32_t> columns;
};
RowEntries row_entries(const PackedMask& positions) {
  RowEntries result;
  result.offsets.push_back(0);
  int64_t row = 0;
  for (size_t w = 0; w < positions.words().size(); ++w) {
    for (uint64_t left = positions.words()[w]; left != 0; left &= left - 1) {
      const int64_t position = static_cast<int64_t>(w) * 64 + std::countr_zero(left);
      while (position >= (row + 1) * positions.cols()) {
        result.offsets.push_back(static_cast<int32_t>(result.columns.size()));
        ++row;
      }
      result.columns.push_back(static_cast<int32_t>(position % positions.cols()));
    }
  }
  while (result.offsets.size() <= static_cast<size_t>(positions.rows())) {
    result.offsets.push_back(static_cast<int32_t>(result.columns.size()));
  }
  return result;
}

at::Tensor int32_tensor(const std::vector<int32_t>& values) {
  const at::Tensor result = at::empty({static_cast<int64_t>(values.size())}, at::kInt);
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<int32_t>());
  return result;
}
at::Tensor column_tensor(const std::vector<int32_t>& columns, bool is_short) {
  if (!is_short) return int32_tensor(columns);
  const at::Tensor result = at::empty({static_cast<int64_t>(columns.size())}, at::kUInt16);
  std::transform(columns.begin(), columns.end(), result.mutable_data_ptr<uint16_t>(),
                 [](int32_t column) { return static_cast<uint16_t>(column); });
  return result;
}

/// The weight's elements at these entries, one after the other.
at::Tensor gather_entries(const at::Tensor& weight, const RowEntries& entries) {
  const at::Tensor places = at::empty({static_cast<int64_t>(entries.columns.size())}, at::kLong);
  int64_t* const place = places.mutable_data_ptr<int64_t>();
  for (size_t row = 0; row + 1 < entries.offsets.size(); ++row) {
    for (int32_t e = entries.offsets[row]; e < entries.offsets[row + 1]; ++e) {
      place[e] =
          static_cast<int64_t>(row) * weight.size(1) + entries.columns[static_cast<size_t>(e)];
    }
  }
  return weight.reshape({-1}).index_select(0, places);
}

void condense(const RowEntries& entries, SparseExport& result) {
  std::vector<int32_t> rows, columns;
  std::vector<int64_t> places;  // of the values
  int64_t fan_in = 0, first_row = 0;
  for (size_t row = 0; row + 1 < entries.offsets.size(); ++row) {
    const int64_t count = entries.offsets[row + 1] - entries.offsets[row];
    if (count == 0) continue;
    if (rows.empty()) {
      fan_in = count;
      first_row = static_cast<int64_t>(row);
    }
    const bool is_short = count == fan_in - 1;
    const bool is_full = count == fan_in && result.full_rows == static_cast<int64_t>(rows.size());
    require(is_full || is_short, kSparseExport, "fan-in", count,
            "of row " + to_text(row) + " differs from " + to_text(fan_in) + " of row " +
                to_text(first_row) + "; condensed weights need constant fan-in, choose kCsr");
    rows.push_back(static_cast<int32_t>(row));
    if (is_full) ++result.full_rows;
    for (int32_t e = entries.offsets[row]; e < entries.offsets[row + 1]; ++e) {
      columns.push_back(entries.columns[static_cast<size_t>(e)]);
      places.push_back(static_cast<int64_t>(columns.size()) - 1);
    }
    if (is_short) columns.push_back(columns.back());
  }
  const auto num_rows = static_cast<int64_t>(rows.size());
  if (result.full_rows < num_rows) {
    const at::Tensor padded =
        at::zeros({static_cast<int64_t>(columns.size())}, result.values.options());
    padded.index_copy_(0, at::tensor(places, at::kLong), result.values);
    result.values = padded;
  }
  result.values = result.values.view({num_rows, fan_in});
  result.indices = column_tensor(columns, result.in <= kMaxShortColumns).view({num_rows, fan_in});
  if (num_rows < result.out) result.rows = int32_tensor(rows);
}

/// Values or columns of condensed rows without their padding, one after the other; others as they
/// are.
at::Tensor unpadded(const SparseExport& weight, const at::Tensor& entries) {
  const bool is_padded =
      weight.format == SparseFormat::kCondensed && weight.full_rows < weight.values.size(0);
  if (!is_padded) return entries;
  if (entries.scalar_type() == at::kUInt16) {  // which LibTorch hardly computes with
    return unpadded(weight, entries.view(at::kShort)).view(at::kUInt16);
  }
  const int64_t short_rows = entries.size(0) - weight.full_rows, fan_in = entries.size(1);
  return at::cat(
      {entries.narrow(0, 0, weight.full_rows).reshape({-1}),
       entries.narrow(0, weight.full_rows, short_rows).narrow(1, 0, fan_in - 1).reshape({-1})});
}
/// The inverse for the gradient of values.
at::Tensor padded_gradient(const SparseExport& weight, const at::Tensor& gradient) {
  if (gradient.numel() == weight.values.numel()) return gradient.view(weight.values.sizes());
  const int64_t fan_in = weight.values.size(1), num_full = weight.full_rows * fan_in;
  const at::Tensor result = at::zeros(weight.values.sizes(), gradient.options());
  result.narrow(0, 0, weight.full_rows)
      .copy_(gradient.narrow(0, 0, num_full).view({weight.full_rows, fan_in}));
  result.narrow(0, weight.full_rows, result.size(0) - weight.full_rows)
      .narrow(1, 0, fan_in - 1)
      .copy_(gradient.narrow(0, num_full, gradient.numel() - num_full).view({-1, fan_in - 1}));
  return result;
}

int64_t places_per_byte(int64_t group) { return group <= 4 ? 4 : 1; }

void pack_groups(const RowEntries& entries, const AtomLayout& layout, SparseExport& result) {
  const int64_t group = layout.cells.atoms_per_cell, keep = layout.group_keep;
  require(layout.is_elementwise() && keep > 0, kSparseExport, "layout", "given",
          "is not N:M; choose another format");
  require(group <= 256, kSparseExport, "group", group, "exceeds 256, which a byte reaches");
  const int64_t per_byte = places_per_byte(group);
  const auto count = static_cast<int64_t>(entries.columns.size());
  result.group = group;
  result.group_keep = keep;
  result.values = result.values.view({result.out, result.in / group * keep});
  result.indices = at::zeros({(count + per_byte - 1) / per_byte}, at::kByte);
  uint8_t* const bytes = result.indices.mutable_data_ptr<uint8_t>();
  for (int64_t e = 0; e < count; ++e) {
    const int64_t place = entries.columns[static_cast<size_t>(e)] % group;
    bytes[e / per_byte] |= static_cast<uint8_t>(place << (e % per_byte * 2));
  }
}

void pack_blocks(const at::Tensor& weight, const AtomLayout& layout, const PackedMask& mask,
                 SparseExport& result) {
  const int64_t bh = layout.atom_rows, bw = layout.atom_cols;
  const RowEntries blocks = row_entries(mask);
  const at::Tensor padded = at::constant_pad_nd(
      weight, {0, layout.cols * bw - layout.in, 0, layout.rows * bh - layout.out});
  result.block_rows = bh;
  result.block_cols = bw;
  result.offsets = int32_tensor(blocks.offsets);
  result.indices = int32_tensor(blocks.columns);
  result.values =
      at::zeros({static_cast<int64_t>(blocks.columns.size()), bh, bw}, weight.options());
  for (int64_t row = 0; row < layout.rows; ++row) {
    const auto line = static_cast<size_t>(row);
    for (int32_t b = blocks.offsets[line]; b < blocks.offsets[line + 1]; ++b) {
      const int64_t column = blocks.columns[static_cast<size_t>(b)];
      result.values[b].copy_(padded.narrow(0, row * bh, bh).narrow(1, column * bw, bw));
    }
  }
}

/// Offsets and columns that csr_product takes; values are in the same order in every format but
/// blocks.
struct CsrIndices {
  at::Tensor offsets;  ///< int32 [out + 1]
  at::Tensor columns;  ///< int32 or uint16 [nnz]
};
CsrIndices csr_indices(const SparseExport& weight) {
  if (weight.format == SparseFormat::kCsr || weight.format == SparseFormat::kShortCsr) {
    return {weight.offsets, weight.indices};
  }
  std::vector<int32_t> offsets(static_cast<size_t>(weight.out) + 1, 0);
  if (weight.format == SparseFormat::kCondensed) {
    const auto fan_in = static_cast<int32_t>(weight.values.size(1));
    for (int64_t i = 0; i < weight.values.size(0); ++i) {
      const int64_t row = weight.rows.defined() ? weight.rows.const_data_ptr<int32_t>()[i] : i;
      offsets[static_cast<size_t>(row) + 1] = i < weight.full_rows ? fan_in : fan_in - 1;
    }
  } else {
    std::fill(offsets.begin() + 1, offsets.end(), static_cast<int32_t>(weight.values.size(1)));
  }
  for (size_t row = 1; row < offsets.size(); ++row) offsets[row] += offsets[row - 1];
  if (weight.format == SparseFormat::kCondensed) {
    return {int32_tensor(offsets), unpadded(weight, weight.indices).contiguous().view({-1})};
  }
  std::vector<int32_t> columns(static_cast<size_t>(weight.values.numel()));
  const int64_t per_byte = places_per_byte(weight.group), per_row = weight.values.size(1);
  const uint8_t* const bytes = weight.indices.const_data_ptr<uint8_t>();
  for (size_t e = 0; e < columns.size(); ++e) {
    const auto entry = static_cast<int64_t>(e);
    const int place = per_byte == 1 ? bytes[entry] : bytes[entry / 4] >> (entry % 4 * 2) & 3;
    columns[e] = static_cast<int32_t>(entry % per_row / weight.group_keep * weight.group) + place;
  }
  return {int32_tensor(offsets), int32_tensor(columns)};
}

/// A weight where autograd keeps values of a step.
struct ExportHolder : torch::CustomClassHolder {
  explicit ExportHolder(SparseExport shared) : weight(std::move(shared)) {}
  SparseExport weight;
};

at::ScalarType sum_type(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

struct MatmulGradients {
  at::Tensor x, values;
};

kernels::CsrWeight csr_weight(const SparseExport& weight, const CsrIndices& indices,
                              const at::Tensor& values) {
  kernels::CsrWeight csr;
  csr.M = weight.out;
  csr.N = weight.in;
  csr.row_offsets = int32_data(indices.offsets);
  if (indices.columns.scalar_type() == at::kUInt16) {
    csr.short_columns = indices.columns.const_data_ptr<uint16_t>();
  } else {
    csr.columns = int32_data(indices.columns);
  }
  csr.values = data_of(values);
  return csr;
}

kernels::BlockWeights block_weights(const SparseExport& weight, const at::Tensor& values) {
  return {1,
          weight.out,
          weight.in,
          weight.block_rows,
          weight.block_cols,
          int32_data(weight.offsets),
          int32_data(weight.indices),
          data_of(values)};
}

at::Tensor multiply_export(const at::Tensor& x, const SparseExport& weight) {
  const at::ScalarType type = sum_type(weight.values);
  const at::Tensor values = weight.values.detach().to(type).contiguous();
  const kernels::DType dtype = dtype_of(values, kSparseExport);
  const int64_t num_rows = x.size(0);
  if (weight.format == SparseFormat::kBlockCsr) {
    const at::Tensor rows = x.to(type).contiguous();
    const at::Tensor y = at::empty({num_rows, weight.out}, rows.options());
    const int64_t row_offsets[] = {0, num_rows};
    kernels::block_product(block_weights(weight, values), data_of(rows), row_offsets, dtype,
                           mutable_data_of(y));
    return y.to(weight.values.scalar_type());
  }
  const CsrIndices indices = csr_indices(weight);
  const at::Tensor entries = unpadded(weight, values);
  const at::Tensor columns = x.to(type).t().contiguous();
  const at::Tensor y = at::empty({weight.out, num_rows}, columns.options());
  kernels::csr_product(csr_weight(weight, indices, entries), data_of(columns), num_rows, dtype,
                       mutable_data_of(y));
  return y.to(weight.values.scalar_type()).t();
}

MatmulGradients multiply_export_backward(const at::Tensor& x, const at::Tensor& delta,
                                         const SparseExport& weight, bool needs_x,
                                         bool needs_values) {
  const at::ScalarType own = weight.values.scalar_type(), type = sum_type(weight.values);
  const at::Tensor values = weight.values.detach().to(type).contiguous();
  const kernels::DType dtype = dtype_of(values, kSparseExport);
  const int64_t num_rows = x.size(0);
  MatmulGradients result;
  if (weight.format == SparseFormat::kBlockCsr) {
    const at::Tensor rows = x.to(type).contiguous(), deltas = delta.to(type).contiguous();
    const int64_t row_offsets[] = {0, num_rows};
    if (needs_x) {
      const at::Tensor grad_x = at::empty({num_rows, weight.in}, rows.options());
      kernels::block_transposed_product(block_weights(weight, values), data_of(deltas), row_offsets,
                                        dtype, mutable_data_of(grad_x));
      result.x = grad_x.to(own);
    }
    if (needs_values) {
      const at::Tensor grad_values = at::empty(values.sizes(), values.options());
      kernels::block_outer_product(block_weights(weight, values), data_of(deltas), data_of(rows),
                                   row_offsets, dtype, mutable_data_of(grad_values));
      result.values = grad_values.to(own);
    }
    return result;
  }
  const CsrIndices indices = csr_indices(weight);
  const at::Tensor entries = unpadded(weight, values);
  const kernels::CsrWeight csr = csr_weight(weight, indices, entries);
  const at::Tensor deltas = delta.to(type).t().contiguous();
  if (needs_x) {
    const at::Tensor grad_x = at::empty({weight.in, num_rows}, deltas.options());
    kernels::csr_transposed_product(csr, data_of(deltas), num_rows, dtype, mutable_data_of(grad_x));
    result.x = grad_x.to(own).t();
  }
  if (needs_values) {
    const at::Tensor columns = x.to(type).t().contiguous();
    const at::Tensor grad_entries = at::empty(entries.sizes(), entries.options());
    kernels::csr_outer_product(csr, data_of(deltas), data_of(columns), num_rows, dtype,
                               mutable_data_of(grad_entries));
    result.values = padded_gradient(weight, grad_entries).to(own);
  }
  return result;
}

struct SparseMatmul : torch::autograd::Function<SparseMatmul> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& values,
                            const SparseExport& weight) {
    context->save_for_backward({x, values});
    SparseExport kept = weight;
    kept.values = at::Tensor();  // autograd looks after it
    context->saved_data["weight"] =
        c10::IValue::make_capsule(c10::make_intrusive<ExportHolder>(std::move(kept)));
    return multiply_export(x, weight);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const c10::intrusive_ptr<c10::intrusive_ptr_target> capsule =
        context->saved_data["weight"].toCapsule();
    SparseExport weight = static_cast<const ExportHolder&>(*capsule).weight;
    weight.values = saved[1];
    const MatmulGradients result = multiply_export_backward(
        saved[0], grads[0], weight, context->needs_input_grad(0), context->needs_input_grad(1));
    return {result.x, result.values, at::Tensor()};
  }
};

}  // namespace

int64_t SparseExport::bytes() const {
  size_t sum = 0;
  for (const at::Tensor& tensor : {values, indices, offsets, rows}) {
    if (tensor.defined()) sum += tensor.storage().nbytes();
  }
  return static_cast<int64_t>(sum);
}

SparseExport export_as(const at::Tensor& weight, const AtomLayout& layout, const PackedMask& mask,
                       SparseFormat format) {
  require(weight.dim() == 2 && weight.size(0) == layout.out && weight.size(1) == layout.in,
          kSparseExport, "weight", to_text(weight.sizes()),
          "is not [out=" + to_text(layout.out) + ", in=" + to_text(layout.in) + "]");
  require(mask.rows() == layout.rows && mask.cols() == layout.cols, kSparseExport, "mask",
          to_text(mask.rows()) + "x" + to_text(mask.cols()),
          "is not of the layout's " + to_text(layout.rows) + "x" + to_text(layout.cols) + " atoms");
  require(layout.out * layout.in <= INT32_MAX, kSparseExport, "weight", to_text(weight.sizes()),
          "has 2^31 entries or more");
  const at::Tensor source = weight.detach().to(at::kCPU).contiguous();
  SparseExport result;
  result.format = format;
  result.out = layout.out;
  result.in = layout.in;
  if (format == SparseFormat::kBlockCsr) {
    pack_blocks(source, layout, mask, result);
    return result;
  }
  const RowEntries entries = row_entries(position_bits(layout, mask));
  result.values = gather_entries(source, entries);
  if (format == SparseFormat::kCondensed) {
    condense(entries, result);
  } else if (format == SparseFormat::kGroups) {
    pack_groups(entries, layout, result);
  } else {
    const bool is_short = format == SparseFormat::kShortCsr;
    require(!is_short || layout.in <= kMaxShortColumns, kSparseExport, "in", layout.in,
            "exceeds 65536, which columns of 16 bits reach; choose kCsr");
    result.offsets = int32_tensor(entries.offsets);
    result.indices = column_tensor(entries.columns, is_short);
  }
  return result;
}

at::Tensor dense_weight(const SparseExport& weight) {
  const at::Tensor values = weight.values.detach().contiguous();
  if (weight.format == SparseFormat::kBlockCsr) {
    const int64_t rows = weight.offsets.numel() - 1;
    const int64_t columns = (weight.in + weight.block_cols - 1) / weight.block_cols;
    const at::Tensor padded =
        at::zeros({rows * weight.block_rows, columns * weight.block_cols}, values.options());
    const int32_t* const offsets = int32_data(weight.offsets);
    for (int64_t row = 0; row < rows; ++row) {
      for (int32_t b = offsets[row]; b < offsets[row + 1]; ++b) {
        padded.narrow(0, row * weight.block_rows, weight.block_rows)
            .narrow(1, int32_data(weight.indices)[b] * weight.block_cols, weight.block_cols)
            .copy_(values[b]);
      }
    }
    return padded.narrow(0, 0, weight.out).narrow(1, 0, weight.in).contiguous();
  }
  const CsrIndices indices = csr_indices(weight);
  const at::Tensor columns = indices.columns.to(at::kLong);
  const at::Tensor counts =
      indices.offsets.narrow(0, 1, weight.out) - indices.offsets.narrow(0, 0, weight.out);
  const at::Tensor rows = at::repeat_interleave(counts.to(at::kLong));
  const at::Tensor result = at::zeros({weight.out * weight.in}, values.options());
  result.index_copy_(0, rows * weight.in + columns, unpadded(weight, values).view({-1}));
  return result.view({weight.out, weight.in});
}

at::Tensor sparse_matmul(const at::Tensor& x, const SparseExport& weight) {
  use_libtorch_threads();
  require(x.dim() == 2 && x.size(1) == weight.in, kSparseExport, "x", to_text(x.sizes()),
          "is not [N, in=" + to_text(weight.in) + "]");
  require(x.scalar_type() == weight.values.scalar_type() && x.is_cpu() && weight.values.is_cpu(),
          kSparseExport, "x", to_text(x.scalar_type()) + " on " + to_text(x.device()),
          "is not of the values' type " + to_text(weight.values.scalar_type()) + " in host memory");
  return SparseMatmul::apply(x, weight.values, weight);
}

}  // namespace perseid
