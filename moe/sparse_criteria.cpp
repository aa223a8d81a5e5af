#include "moe/sparse_criteria.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/error.h"
#include "kernels/sampled_product.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

constexpr const char* kSparseCriteria = "sparse_criteria";
/// Elements of a chunk of the product where the kernel does not serve.
constexpr int64_t kSampleChunk = int64_t{1} << 22;

/// body(place, number) for the places of a mask, ascending.
template <typename Body>
void for_each_place(const PackedMask& mask, Body&& body) {
  int64_t number = 0;
  for (size_t w = 0; w < mask.words().size(); ++w) {
    for (uint64_t left = mask.words()[w]; left != 0; left &= left - 1) {
      body(static_cast<int64_t>(w) * 64 + std::countr_zero(left), number++);
    }
  }
}

at::ScalarType listed_type(const at::Tensor& values) {
  return values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
bool has_kernel(const at::Tensor& values) { return values.is_cpu() && has_dtype(values); }
/// On the host, of a type that kernels know.
at::Tensor host_values(const at::Tensor& values) {
  const at::Tensor here = values.detach().to(at::kCPU).contiguous();
  return has_kernel(here) ? here : here.to(at::kFloat);
}

void require_positions(const PackedMask& positions, const at::Tensor& values) {
  require(
      values.dim() == 2 && values.size(0) == positions.rows() && values.size(1) == positions.cols(),
      kSparseCriteria, "values", to_text(values.sizes()),
      "is not [out=" + to_text(positions.rows()) + ", in=" + to_text(positions.cols()) + "]");
}

at::Tensor place_tensor(const PackedMask& positions) {
  const at::Tensor places = at::empty({positions.count()}, at::kLong);
  auto* const to = places.mutable_data_ptr<int64_t>();
  for_each_place(positions, [&](int64_t place, int64_t number) { to[number] = place; });
  return places;
}

/// Positions of an atom that are not padding.
double area_of(const AtomLayout& layout, int64_t atom) {
  const int64_t row = atom / layout.cols, col = atom % layout.cols;
  return static_cast<double>(std::min(layout.atom_rows, layout.out - row * layout.atom_rows)) *
         static_cast<double>(std::min(layout.atom_cols, layout.in - col * layout.atom_cols));
}
int64_t atom_of(const AtomLayout& layout, int64_t position) {
  return position / layout.in / layout.atom_rows * layout.cols +
         position % layout.in / layout.atom_cols;
}

/// Root mean square of each of the atoms; value_of(position, number) of each position of theirs.
template <typename ValueOf>
std::vector<double> atom_norms(const AtomLayout& layout, const PackedMask& atoms,
                               ValueOf&& value_of) {
  std::vector<double> norms(static_cast<size_t>(layout.num_atoms()), 0);
  for_each_place(position_bits(layout, atoms), [&](int64_t position, int64_t number) {
    const double value = value_of(position, number);
    norms[static_cast<size_t>(atom_of(layout, position))] += value * value;
  });
  for_each_place(atoms, [&](int64_t atom, int64_t) {
    double& norm = norms[static_cast<size_t>(atom)];
    norm = std::sqrt(norm / area_of(layout, atom));
  });
  return norms;
}

}  // namespace

PackedMask draw_candidates(const AtomLayout& layout, const UpdateRule& rule,
                           const PackedMask& active, double fraction, kernels::RandomKey key) {
  validate(rule);
  PackedMask result(layout.rows, layout.cols);
  const int64_t num_cells = layout.cells.num_cells;
  std::vector<int64_t> k(static_cast<size_t>(num_cells));
  kernels::count_atoms(layout.cells, active.data(), k.data());
  const auto num_moved =
      static_cast<int64_t>(std::floor(fraction * static_cast<double>(active.count())));
  const auto share = static_cast<int64_t>(
      std::min(std::ceil(rule.candidates_per_grown * static_cast<double>(num_moved) /
                         static_cast<double>(num_cells)),
               static_cast<double>(layout.cells.atoms_per_cell)));
  for (int64_t& count : k) {
    const int64_t could_lose = num_cells == 1 ? 0 : std::min(num_moved, count);
    count = std::max(share, could_lose);
  }
  kernels::select_atoms(layout.cells, kernels::AtomOrder::kLargest, nullptr,
                        without(PackedMask::full(layout.rows, layout.cols), active).data(),
                        k.data(), key, result.data());
  return result;
}

at::Tensor listed_values(const PackedMask& positions, const at::Tensor& values) {
  require_positions(positions, values);
  if (!has_kernel(values)) {
    const at::Tensor places = place_tensor(positions).to(values.device());
    return values.reshape({-1}).index_select(0, places).to(listed_type(values)).unsqueeze(0);
  }
  const at::Tensor source = values.contiguous();
  const at::Tensor result = at::empty({1, positions.count()}, listed_type(values));
  kernels::dispatch_dtype(dtype_of(source, kSparseCriteria), kSparseCriteria, [&](auto tag) {
    using T = decltype(tag);
    const auto* const from = static_cast<const T*>(data_of(source));
    auto* const to = static_cast<kernels::Accumulate<T>*>(mutable_data_of(result));
    for_each_place(positions, [&](int64_t place, int64_t number) {
      to[number] = kernels::load(from + place);
    });
  });
  return result;
}

void add_sampled_gradient(const PackedMask& positions, const at::Tensor& x, const at::Tensor& delta,
                          at::Tensor& sums) {
  require(x.dim() == 2 && x.size(1) == positions.cols(), kSparseCriteria, "x", to_text(x.sizes()),
          "is not [rows, in=" + to_text(positions.cols()) + "]");
  require(delta.dim() == 2 && delta.size(0) == x.size(0) && delta.size(1) == positions.rows(),
          kSparseCriteria, "delta", to_text(delta.sizes()),
          "is not [rows=" + to_text(x.size(0)) + ", out=" + to_text(positions.rows()) + "]");
  if (!sums.defined()) {
    sums = at::zeros({1, positions.count()}, x.options().dtype(listed_type(x)));
  }
  if (has_kernel(x) && delta.scalar_type() == x.scalar_type()) {
    const at::Tensor columns = x.t().contiguous(), delta_columns = delta.t().contiguous();
    kernels::sampled_product(data_of(delta_columns), data_of(columns), positions.data(),
                             positions.rows(), positions.cols(), x.size(0),
                             dtype_of(x, kSparseCriteria), mutable_data_of(sums));
    return;
  }
  const at::Tensor places = place_tensor(positions).to(x.device());
  const int64_t chunk = std::max<int64_t>(1, kSampleChunk / std::max<int64_t>(1, x.size(0)));
  for (int64_t first = 0; first < places.numel(); first += chunk) {
    const int64_t count = std::min(chunk, places.numel() - first);
    const at::Tensor mine = places.narrow(0, first, count);
    const at::Tensor of_rows =
        delta.index_select(1, mine.div(positions.cols(), "floor")).to(sums.scalar_type());
    const at::Tensor of_columns =
        x.index_select(1, mine.remainder(positions.cols())).to(sums.scalar_type());
    sums.narrow(1, first, count).add_(of_rows.mul(of_columns).sum(0, /*keepdim=*/true));
  }
}

at::Tensor listed_scores(const AtomLayout& layout, const PackedMask& atoms,
                         const at::Tensor& values) {
  const at::Tensor here = values.detach().to(at::kCPU);
  if (layout.is_elementwise()) return here.to(at::kFloat).view({-1});
  const at::Tensor exact = here.to(at::kDouble);
  const double* const from = exact.const_data_ptr<double>();
  const std::vector<double> norms =
      atom_norms(layout, atoms, [&](int64_t, int64_t number) { return from[number]; });
  const at::Tensor result = at::empty({atoms.count()}, at::kFloat);
  auto* const to = result.mutable_data_ptr<float>();
  for_each_place(atoms, [&](int64_t atom, int64_t number) {
    to[number] = static_cast<float>(norms[static_cast<size_t>(atom)]);
  });
  return result;
}

at::Tensor drop_scores(const AtomLayout& layout, const UpdateRule& rule, const PackedMask& active,
                       const at::Tensor& weight, const at::Tensor& gradient) {
  const at::Tensor source = host_values(weight);
  const at::Tensor slopes =
      gradient.defined() ? gradient.to(at::kCPU, at::kDouble).contiguous() : at::Tensor();
  const double* const g = slopes.defined() ? slopes.const_data_ptr<double>() : nullptr;
  const at::Tensor result = at::empty({layout.num_atoms()}, at::kFloat);
  auto* const to = result.mutable_data_ptr<float>();
  kernels::dispatch_dtype(dtype_of(source, kSparseCriteria), kSparseCriteria, [&](auto tag) {
    using T = decltype(tag);
    const auto* const w = static_cast<const T*>(data_of(source));
    const auto score = [&](int64_t position, int64_t number) {
      const double value = std::abs(double{kernels::load(w + position)});
      const double slope = g == nullptr ? 0 : std::abs(g[number]);
      return rule.drop == DropCriterion::kMest ? value + rule.mest_lambda * slope : value * slope;
    };
    if (layout.is_elementwise()) {
      for_each_place(active, [&](int64_t position, int64_t number) {
        to[position] = static_cast<float>(score(position, number));
      });
      return;
    }
    const std::vector<double> norms = atom_norms(layout, active, score);
    for (size_t atom = 0; atom < norms.size(); ++atom) to[atom] = static_cast<float>(norms[atom]);
  });
  return result;
}

at::Tensor progress_scores(const AtomLayout& layout, const at::Tensor& gradient,
                           const at::Tensor& energy) {
  require(energy.numel() == layout.in, kSparseCriteria, "energy", energy.numel(),
          "is not one for each of in=" + to_text(layout.in) + " columns");
  const at::Tensor of_columns = energy.detach().to(at::kCPU, at::kDouble).contiguous();
  const double* const columns = of_columns.const_data_ptr<double>();
  std::vector<double> of_atoms(static_cast<size_t>(layout.cols), 0);
  for (int64_t col = 0; col < layout.in; ++col) {
    of_atoms[static_cast<size_t>(col / layout.atom_cols)] += columns[col];
  }
  // Without energy there is no gradient: 0 stays 0, and NaN is not hidden.
  for (double& sum : of_atoms) sum = sum == 0 ? 1 : std::sqrt(sum);
  const at::Tensor roots =
      at::from_blob(of_atoms.data(), {1, layout.cols}, at::TensorOptions().dtype(at::kDouble));
  const at::Tensor scores = atom_scores(layout, gradient);
  if (layout.is_elementwise()) return scores.to(at::kDouble).div_(roots).to(at::kFloat).view({-1});
  const at::Tensor result = at::empty({layout.num_atoms()}, at::kFloat);
  const float* const from = scores.const_data_ptr<float>();
  auto* const to = result.mutable_data_ptr<float>();
  for (int64_t atom = 0; atom < layout.num_atoms(); ++atom) {
    to[atom] = static_cast<float>(double{from[atom]} * std::sqrt(area_of(layout, atom)) /
                                  of_atoms[static_cast<size_t>(atom % layout.cols)]);
  }
  return result;
}

}  // namespace perseid
