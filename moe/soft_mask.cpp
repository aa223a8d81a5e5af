#include "moe/soft_mask.h"

#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <ostream>
#include <utility>

#include "kernels/error.h"
#include "kernels/select.h"
#include "moe/tensor_types.h"

namespace perseid {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr const char* kSoftMask = "soft_mask";

const char* name_of(ForwardMethod method) {
  switch (method) {
    case ForwardMethod::kHard:
      return "hard";
    case ForwardMethod::kSte:
      return "ste";
    case ForwardMethod::kSrSte:
      return "sr_ste";
    case ForwardMethod::kMaskDecay:
      return "mask_decay";
    case ForwardMethod::kStructureDecay:
      return "structure_decay";
    case ForwardMethod::kTopKast:
      return "top_kast";
  }
  return "?";
}

std::string to_text_nm(int64_t n, int64_t m) { return to_text(n) + ":" + to_text(m); }

/// The last steps, without decay.
int64_t fine_tune_steps(const Forward& forward) {
  return std::llround(forward.fine_tune * static_cast<double>(forward.total_steps));
}

void require_n_of_m(int64_t n, int64_t m) {
  require(m >= 1, kSoftMask, "m", m, "is below 1");
  require(n >= 1 && n <= m, kSoftMask, "n", n, "is outside [1, m=" + to_text(m) + "]");
}

/// Active weights of each cell of a chosen set.
struct CellCounts {
  AtomLayout layout;
  int64_t active = 0;
  int64_t backward = 0;
};
CellCounts counts_at(const Forward& forward, const AtomLayout& layout, int64_t nnz, int64_t step) {
  CellCounts counts{layout_at(forward, layout, step)};
  const kernels::AtomCells& cells = counts.layout.cells;
  if (is_dense_step(forward, step)) {
    counts.active = cells.atoms_per_cell;
  } else if (forward.method == ForwardMethod::kStructureDecay) {
    counts.active = counts.layout.group_keep;
  } else {
    counts.active = nnz / cells.num_cells;
  }
  if (forward.method == ForwardMethod::kTopKast) {
    counts.backward = std::min(cells.atoms_per_cell,
                               counts.active + forward.backward_extra.of(cells.atoms_per_cell));
  }
  return counts;
}

void fill_tensors(const AtomLayout& layout, const at::Device& device, SoftMask& mask) {
  mask.is_active = position_mask(layout, mask.active).to(device);
  if (mask.backward.num_places() > 0) {
    mask.is_reached = position_mask(layout, mask.backward).to(device);
  }
}

void require_counts(const kernels::AtomCells& cells, const PackedMask& mask, int64_t wanted,
                    const char* argument, const std::string& name) {
  std::vector<int64_t> counts(static_cast<size_t>(cells.num_cells));
  kernels::count_atoms(cells, mask.data(), counts.data());
  for (const int64_t count : counts) {
    require(count == wanted, kSoftMask, (argument + (" of " + name)).c_str(), count,
            "active weights in a cell differ from " + to_text(wanted) +
                ", the number of the step it was chosen in");
  }
}

/// W * (active + factor (1 - active)); gradient * (passes + inactive_gradient (1 - passes)).
struct MaskedWeight : torch::autograd::Function<MaskedWeight> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight,
                            const at::Tensor& is_active, double factor, const at::Tensor& passes,
                            double inactive_gradient) {
    context->saved_data["passes"] = passes;
    context->saved_data["inactive_gradient"] = inactive_gradient;
    // Not a product with 0: an infinity there would become NaN.
    return at::where(is_active, weight, factor == 0 ? at::zeros_like(weight) : weight * factor);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const double factor = context->saved_data["inactive_gradient"].toDouble();
    at::Tensor gradient = grads[0];
    if (factor != 1) {
      const at::Tensor passes = context->saved_data["passes"].toTensor();
      gradient =
          at::where(passes, gradient, factor == 0 ? at::zeros_like(gradient) : gradient * factor);
    }
    return {gradient, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

/// What top_kast_loss multiplies half of each square with.
at::Tensor top_kast_factors(const at::Tensor& weight, const SoftMask& mask, double lambda) {
  const double density =
      static_cast<double>(mask.active.count()) / static_cast<double>(mask.active.num_places());
  at::Tensor factors = at::zeros_like(weight);
  if (mask.is_reached.defined()) factors.masked_fill_(mask.is_reached, lambda / density);
  return factors.masked_fill_(mask.is_active, lambda);
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Forward& forward) {
  if (!forward.is_soft()) return out;
  out << " forward=" << name_of(forward.method) << " dense_steps=" << forward.dense_steps
      << " choose_every=" << forward.every;
  switch (forward.method) {
    case ForwardMethod::kSrSte:
      out << " lambda=" << forward.lambda << " decoupled=" << forward.decoupled;
      break;
    case ForwardMethod::kMaskDecay:
      out << " decay=" << (forward.decay == MaskDecay::kLinear ? "linear" : "exponential")
          << " decay_rate=" << forward.decay_rate << " fine_tune=" << fine_tune_steps(forward)
          << " total_steps=" << forward.total_steps;
      break;
    case ForwardMethod::kStructureDecay:
      out << " total_steps=" << forward.total_steps << " frames=";
      for (const NmFrame& frame : forward.frames) {
        out << (&frame == forward.frames.data() ? "" : ",") << to_text_nm(frame.n, frame.m);
      }
      break;
    case ForwardMethod::kTopKast:
      out << " lambda=" << forward.lambda
          << " backward_extra=" << forward.backward_extra.numerator() << "/"
          << forward.backward_extra.denominator();
      break;
    default:
      break;
  }
  const bool has_inactive = forward.method == ForwardMethod::kMaskDecay ||
                            forward.method == ForwardMethod::kStructureDecay;
  if (has_inactive) {
    out << " inactive=" << (forward.inactive == InactiveGradient::kSte ? "ste" : "scaled");
  }
  return out;
}

void validate(const Forward& forward, const Structure& structure) {
  if (!forward.is_soft()) return;
  const ForwardMethod method = forward.method;
  require(structure.atom_rows == 1 && structure.atom_cols == 1, kSoftMask, "atom",
          to_text(structure.atom_rows) + "x" + to_text(structure.atom_cols),
          std::string("is not 1x1, which forward=") + name_of(method) + " needs");
  require(forward.dense_steps >= 0, kSoftMask, "dense_steps", forward.dense_steps, "is negative");
  require(method != ForwardMethod::kTopKast || forward.dense_steps == 0, kSoftMask, "dense_steps",
          forward.dense_steps, "is not 0, but top_kast has no dense phase");
  require(forward.every >= 1, kSoftMask, "every", forward.every, "is below 1");
  require(std::isfinite(forward.lambda) && forward.lambda >= 0, kSoftMask, "lambda", forward.lambda,
          "is not a finite number of 0 or more");
  require(!forward.decoupled || method == ForwardMethod::kSrSte, kSoftMask, "decoupled", "true",
          std::string("is of sr_ste only, not of ") + name_of(method));
  const bool has_inactive =
      method == ForwardMethod::kMaskDecay || method == ForwardMethod::kStructureDecay;
  require(forward.inactive == InactiveGradient::kSte || has_inactive, kSoftMask, "inactive",
          "scaled",
          std::string("is of mask_decay and structure_decay only, not of ") + name_of(method));
  require(std::isfinite(forward.decay_rate) && forward.decay_rate >= 0, kSoftMask, "decay_rate",
          forward.decay_rate, "is not a finite number of 0 or more");
  require(forward.fine_tune >= 0 && forward.fine_tune <= 1, kSoftMask, "fine_tune",
          forward.fine_tune, "is outside [0, 1]");
  require(forward.fine_tune == 0 || method == ForwardMethod::kMaskDecay, kSoftMask, "fine_tune",
          forward.fine_tune, std::string("is of mask_decay only, not of ") + name_of(method));
  const bool needs_total = method == ForwardMethod::kStructureDecay || forward.fine_tune > 0;
  require(!needs_total || forward.total_steps > forward.dense_steps, kSoftMask, "total_steps",
          forward.total_steps,
          "is not above dense_steps=" + to_text(forward.dense_steps) +
              "; frames and fine_tune are shares of it");
  if (method != ForwardMethod::kStructureDecay) {
    require(forward.frames.empty(), kSoftMask, "frames", forward.frames.size(),
            std::string("are of structure_decay only, not of ") + name_of(method));
    return;
  }
  require(structure.cell == Cell::kGroup, kSoftMask, "cell", static_cast<int>(structure.cell),
          "is not N:M, which structure_decay needs; use Structure::n_of_m");
  require(!forward.frames.empty(), kSoftMask, "frames", 0, "are missing; list one or more");
  for (const NmFrame& frame : forward.frames) {
    require(frame.m >= 1 && frame.n >= 1 && frame.n <= frame.m, kSoftMask, "frames",
            to_text_nm(frame.n, frame.m), "is not N:M with 1 <= N <= M");
  }
  const NmFrame& last = forward.frames.back();
  require(last == NmFrame{structure.group_keep, structure.group}, kSoftMask, "frames",
          to_text_nm(last.n, last.m),
          "is the last but not " + to_text_nm(structure.group_keep, structure.group) +
              " of the structure; end with that");
}

std::vector<NmFrame> stepwise_frames(int64_t n, int64_t m) {
  require_n_of_m(n, m);
  require(m % n == 0 && std::has_single_bit(static_cast<uint64_t>(m / n)), kSoftMask, "m/n",
          to_text(m) + "/" + to_text(n), "is not a power of 2; list frames of your own");
  if (n == m) return {{n, m}};
  std::vector<NmFrame> frames;
  if (m - 1 > m / 2) frames.push_back({m - 1, m});
  for (int64_t keep = m / 2; keep >= n; keep /= 2) frames.push_back({keep, m});
  return frames;
}
std::vector<NmFrame> geometric_frames(int64_t n, int64_t m) {
  require_n_of_m(n, m);
  return {{8 * n, 8 * m}, {4 * n, 4 * m}, {2 * n, 2 * m}, {n, m}};
}
std::vector<NmFrame> densify_frames(int64_t n, int64_t m) {
  require_n_of_m(n, m);
  return {{n, 8 * m}, {n, 4 * m}, {n, 2 * m}, {n, m}};
}

bool is_dense_step(const Forward& forward, int64_t step) { return step < forward.dense_steps; }

int64_t frame_index(const Forward& forward, int64_t step) {
  const auto count = static_cast<int64_t>(forward.frames.size());
  if (count == 0) return 0;
  const int64_t since = std::max<int64_t>(step - forward.dense_steps, 0);
  const int64_t length = forward.total_steps - forward.dense_steps;
  return since >= length ? count - 1 : since * count / length;
}

double inactive_factor(const Forward& forward, int64_t step) {
  if (!forward.is_soft()) return 0;
  if (is_dense_step(forward, step)) return 1;
  if (forward.method != ForwardMethod::kMaskDecay) return 0;
  if (forward.fine_tune > 0 && step >= forward.total_steps - fine_tune_steps(forward)) return 0;
  const auto t = static_cast<double>(step - forward.dense_steps);
  if (forward.decay == MaskDecay::kExponential) return std::exp(-forward.decay_rate * t);
  // 1 - rate * t may miss 0 by a rounding.
  const double left = 1 - forward.decay_rate * t;
  return left > 1e-12 ? left : 0;
}

bool is_choice_due(const Forward& forward, int64_t step, int64_t chosen_step) {
  if (chosen_step < 0) return true;
  const bool is_dense = is_dense_step(forward, step);
  if (is_dense || is_dense_step(forward, chosen_step)) {
    return is_dense != is_dense_step(forward, chosen_step);
  }
  const auto turn = [&](int64_t of) { return (of - forward.dense_steps) / forward.every; };
  return turn(step) != turn(chosen_step) ||
         frame_index(forward, step) != frame_index(forward, chosen_step);
}

PackedMask largest_weights(const at::Tensor& weight, const kernels::AtomCells& cells, int64_t k,
                           const std::string& name, int64_t layer, int64_t step) {
  require(weight.dim() == 2 && weight.numel() == cells.num_atoms(), kSoftMask,
          ("weight of " + name).c_str(), to_text(weight.sizes()),
          "is not [out, in] of " + to_text(cells.num_atoms()) + " weights in cells");
  require(k >= 0 && k <= cells.atoms_per_cell, kSoftMask, ("k of " + name).c_str(), k,
          "is outside [0, " + to_text(cells.atoms_per_cell) + "], the weights of a cell");
  const bool is_double = weight.scalar_type() == at::kDouble;
  const at::Tensor sizes =
      at::abs(weight.detach().to(at::kCPU, is_double ? at::kDouble : at::kFloat)).contiguous();
  const int64_t num_finite = at::isfinite(sizes).sum().item<int64_t>();
  if (num_finite != sizes.numel()) {
    ErrorDetail detail{kSoftMask, "weights of " + name, to_text(sizes.numel() - num_finite),
                       "are NaN or infinite; the training has diverged"};
    detail.layer = static_cast<int>(layer);
    detail.step = step;
    throw Diverged(detail);
  }
  const at::Tensor is_kept = at::empty(sizes.sizes(), at::kByte);
  uint8_t* const bytes = is_kept.mutable_data_ptr<uint8_t>();
  kernels::select_k_rows(data_of(sizes), cells.num_cells, cells.atoms_per_cell, k,
                         dtype_of(sizes, kSoftMask), bytes);
  PackedMask mask(weight.size(0), weight.size(1));
  for (int64_t place = 0; place < mask.num_places(); ++place) {
    mask.data()[place / 64] |= uint64_t{bytes[place]} << (place % 64);
  }
  return mask;
}

AtomLayout layout_at(const Forward& forward, const AtomLayout& layout, int64_t step) {
  if (forward.method != ForwardMethod::kStructureDecay) return layout;
  const NmFrame& frame = forward.frames[static_cast<size_t>(frame_index(forward, step))];
  return make_layout(Structure::n_of_m(frame.n, frame.m), layout.out, layout.in,
                     "frame " + to_text_nm(frame.n, frame.m));
}

SoftMask choose_soft_mask(const Forward& forward, const AtomLayout& layout, int64_t nnz,
                          const at::Tensor& weight, int64_t step, const std::string& name,
                          int64_t layer) {
  const CellCounts counts = counts_at(forward, layout, nnz, step);
  SoftMask mask;
  mask.active = largest_weights(weight, counts.layout.cells, counts.active, name, layer, step);
  if (forward.method == ForwardMethod::kTopKast) {
    // Both sets are the first of one order, so this one holds the other.
    mask.backward =
        largest_weights(weight, counts.layout.cells, counts.backward, name, layer, step);
  }
  mask.chosen_step = step;
  fill_tensors(layout, weight.device(), mask);
  set_factors(forward, step, mask);
  return mask;
}

SoftMask restore_soft_mask(const Forward& forward, const AtomLayout& layout, int64_t nnz,
                           PackedMask active, PackedMask backward, int64_t chosen_step,
                           const at::Tensor& weight, const std::string& name) {
  require(chosen_step >= -1, kSoftMask, ("chosen_step of " + name).c_str(), chosen_step,
          "is below -1");
  const int64_t step = std::max<int64_t>(chosen_step, 0);
  const CellCounts counts = counts_at(forward, layout, nnz, step);
  require_counts(counts.layout.cells, active, counts.active, "mask", name);
  const bool has_backward = forward.method == ForwardMethod::kTopKast;
  const bool has_shape = !has_backward
                             ? backward.num_places() == 0
                             : backward.rows() == layout.rows && backward.cols() == layout.cols;
  require(has_shape, kSoftMask, ("backward mask of " + name).c_str(),
          to_text(backward.rows()) + "x" + to_text(backward.cols()),
          has_backward ? "is not of the weight's shape" : "is of top_kast only");
  if (has_backward) {
    require_counts(counts.layout.cells, backward, counts.backward, "backward mask", name);
  }
  SoftMask mask;
  mask.active = std::move(active);
  mask.backward = std::move(backward);
  mask.chosen_step = chosen_step;
  fill_tensors(layout, weight.device(), mask);
  set_factors(forward, step, mask);
  return mask;
}

void set_factors(const Forward& forward, int64_t step, SoftMask& mask) {
  mask.inactive_factor = inactive_factor(forward, step);
  const bool is_masked = forward.method == ForwardMethod::kTopKast;
  mask.inactive_gradient = is_masked                                       ? 0
                           : forward.inactive == InactiveGradient::kScaled ? mask.inactive_factor
                                                                           : 1;
}

at::Tensor effective_weight(const at::Tensor& weight, const SoftMask& mask) {
  if (mask.inactive_factor == 1) return weight;
  return MaskedWeight::apply(weight, mask.is_active, mask.inactive_factor,
                             mask.is_reached.defined() ? mask.is_reached : mask.is_active,
                             mask.inactive_gradient);
}

at::Tensor top_kast_loss(const at::Tensor& weight, const SoftMask& mask, double lambda) {
  return (weight.square() * top_kast_factors(weight.detach(), mask, lambda)).sum() * 0.5;
}

void add_gradient_term(const Forward& forward, const SoftMask& mask, const at::Tensor& weight,
                       const at::Tensor& gradient) {
  if (forward.lambda == 0) return;
  if (forward.method == ForwardMethod::kSrSte && !forward.decoupled) {
    gradient.add_(weight.masked_fill(mask.is_active, 0), forward.lambda);
  }
  if (forward.method == ForwardMethod::kTopKast) {
    gradient.addcmul_(weight, top_kast_factors(weight, mask, forward.lambda));
  }
}

void decay_inactive(const Forward& forward, const SoftMask& mask, double learning_rate,
                    const at::Tensor& weight) {
  if (forward.method != ForwardMethod::kSrSte || !forward.decoupled) return;
  weight.copy_(at::where(mask.is_active, weight, weight * (1 - learning_rate * forward.lambda)));
}

}  // namespace perseid
