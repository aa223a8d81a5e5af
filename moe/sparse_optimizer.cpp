#include "moe/sparse_optimizer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/serialize/archive.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "kernels/active_step.h"
#include "kernels/error.h"
#include "moe/optimizer_states.h"
#include "moe/tensor_types.h"
#include "moe/threads.h"

namespace perseid {
namespace {

constexpr const char* kSparseOptimizer = "sparse_optimizer";

int64_t count_slots(const at::Tensor& parameter, int64_t slot) {
  return slot < 0 ? 1 : parameter.size(0);
}

at::ScalarType state_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void set_positions(ActiveStates& states, PackedMask positions) {
  states.block_starts.resize(
      static_cast<size_t>(kernels::num_active_blocks(positions.num_places()) + 1));
  kernels::count_active_blocks(positions.data(), positions.num_places(),
                               states.block_starts.data());
  states.positions = std::move(positions);
}

int64_t num_active(const ActiveStates& states) { return states.block_starts.back(); }

/// Two masks of a weight, and what moving states from one to the other needs.
struct Repacking {
  const PackedMask& before;
  const PackedMask& after;
  int64_t first = 0, last = 0;  ///< range of positions whose states count for means
  int64_t num_before = 0, num_after = 0;
};
Repacking repacking(const PackedMask& before, const PackedMask& after, int64_t first,
                    int64_t last) {
  return {before, after, first, last, before.count(), after.count()};
}

/// Values of `before` become those of `after`, word by word and without branches on bits.
/// @param fill  of those that were not active
template <typename A>
at::Tensor repacked(const at::Tensor& values, const Repacking& plan, A fill) {
  const at::Tensor result = at::empty({plan.num_after}, values.options());
  const A* from = static_cast<const A*>(data_of(values));
  A* to = static_cast<A*>(mutable_data_of(result));
  if (plan.num_before == 0) {
    std::fill_n(to, plan.num_after, fill);
    return result;
  }
  const A* const last = from + plan.num_before - 1;
  A of_word[65];
  for (size_t w = 0; w < plan.after.words().size(); ++w) {
    const uint64_t was = plan.before.words()[w], is = plan.after.words()[w];
    int count = 0;
    for (uint64_t left = was | is; left != 0; left &= left - 1) {
      const int bit = std::countr_zero(left);
      const bool was_active = (was >> bit & 1) != 0;
      const A old = *std::min(from, last);  // one that is not there is not used
      of_word[count] = was_active ? old : fill;
      from += was_active ? 1 : 0;
      count += static_cast<int>(is >> bit & 1);
    }
    to = std::copy_n(of_word, count, to);
  }
  return result;
}

/// Mean of those of the range that stay; sums in order, as for dense states. 0 without any.
template <typename A>
double mean_kept(const at::Tensor& values, const Repacking& plan) {
  const A* const from = static_cast<const A*>(data_of(values));
  double sum = 0;
  int64_t count = 0, number = 0;
  for (size_t w = 0; w < plan.before.words().size(); ++w) {
    const auto place = static_cast<int64_t>(w) * 64;
    const uint64_t is = plan.after.words()[w];
    for (uint64_t left = plan.before.words()[w]; left != 0; left &= left - 1) {
      const int bit = std::countr_zero(left);
      const A value = from[number++];
      const bool is_kept =
          (is >> bit & 1) != 0 && place + bit >= plan.first && place + bit < plan.last;
      if (!is_kept) continue;
      sum += static_cast<double>(value);
      ++count;
    }
  }
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

/// change(value, element of the dense tensor at its position) for each that has grown.
/// @param values  those of `after`
/// @param first   position of the dense tensor's first element
template <typename A, typename Change>
void change_grown(const at::Tensor& values, const Repacking& plan, const at::Tensor& dense,
                  int64_t first, Change&& change) {
  const at::Tensor flat = dense.to(state_type(dense)).contiguous();
  const A* const from = static_cast<const A*>(data_of(flat));
  A* const to = static_cast<A*>(mutable_data_of(values));
  int64_t number = 0;
  for (size_t w = 0; w < plan.after.words().size(); ++w) {
    const uint64_t is = plan.after.words()[w], was = plan.before.words()[w];
    for (uint64_t left = is & ~was; left != 0; left &= left - 1) {
      const int bit = std::countr_zero(left);
      const int64_t before_it = std::popcount(is & ((uint64_t{1} << bit) - 1));
      change(to[number + before_it], from[static_cast<int64_t>(w) * 64 + bit - first]);
    }
    number += std::popcount(is);
  }
}

template <typename A>
void repack(ActiveStates& states, const at::Tensor& weight, const Repacking& plan,
            GrownSecondMoment policy, const at::Tensor& gradient, int64_t first) {
  const auto take = [](A& value, A element) { value = element; };
  if (states.master.defined()) {
    states.master = repacked<A>(states.master, plan, A{0});
    change_grown<A>(states.master, plan, weight, 0, take);
  }
  if (states.momentum.defined()) states.momentum = repacked<A>(states.momentum, plan, A{0});
  for (at::Tensor* const moment : {&states.second_moment, &states.max_second_moment}) {
    if (!moment->defined()) continue;
    const bool is_mean = policy == GrownSecondMoment::kMean;
    const A start = is_mean ? static_cast<A>(mean_kept<A>(*moment, plan)) : A{0};
    *moment = repacked<A>(*moment, plan, start);
    if (policy != GrownSecondMoment::kGradient) continue;
    change_grown<A>(*moment, plan, gradient, first, [](A& value, A g) { value = g * g; });
  }
  if (states.age.defined()) states.age = repacked<uint16_t>(states.age, plan, 0);
}

/// What the slots of one parameter are stepped with.
struct Call {
  int64_t step = 0;
  kernels::BiasCorrections* by_age = nullptr;
  kernels::ActiveEntries entries;
  kernels::StepWeights weights;
};

at::Tensor new_states(const ActiveStates& states, const at::Tensor& weight) {
  return at::zeros({num_active(states)}, weight.options().dtype(state_type(weight)));
}

/// The step of one slot by a kernel; states that are not there yet are made.
void step_slot(const torch::optim::SGDOptions& options, const Call& call, const at::Tensor& weight,
               ActiveStates& states) {
  kernels::SgdStep sgd;
  sgd.lr = options.lr();
  sgd.momentum = options.momentum();
  sgd.dampening = options.dampening();
  sgd.weight_decay = options.weight_decay();
  sgd.nesterov = options.nesterov();
  if (options.momentum() != 0 && !states.momentum.defined()) {
    states.momentum = new_states(states, weight);
    sgd.is_first = true;
  }
  kernels::sgd_active_step(call.entries, sgd, call.weights, mutable_data_of(states.momentum));
}

template <typename AdamOptions>
void step_slot(const AdamOptions& options, const Call& call, const at::Tensor& weight,
               ActiveStates& states) {
  kernels::AdamStep adam;
  adam.lr = options.lr();
  adam.beta1 = std::get<0>(options.betas());
  adam.beta2 = std::get<1>(options.betas());
  adam.eps = options.eps();
  adam.weight_decay = options.weight_decay();
  adam.is_decoupled = std::is_same_v<AdamOptions, torch::optim::AdamWOptions>;
  adam.step = call.step;
  if (!states.momentum.defined()) states.momentum = new_states(states, weight);
  if (!states.second_moment.defined()) states.second_moment = new_states(states, weight);
  if (options.amsgrad() && !states.max_second_moment.defined()) {
    states.max_second_moment = new_states(states, weight);
  }
  kernels::AdamStates pointers;
  pointers.momentum = mutable_data_of(states.momentum);
  pointers.second_moment = mutable_data_of(states.second_moment);
  if (options.amsgrad()) pointers.max_second_moment = mutable_data_of(states.max_second_moment);
  if (states.age.defined()) {
    call.by_age->extend(adam);
    pointers.age = static_cast<uint16_t*>(mutable_data_of(states.age));
    pointers.by_age = call.by_age;
  }
  kernels::adam_active_step(call.entries, adam, call.weights, pointers);
}

template <typename Options>
void step_parameter(const Options& options, int64_t step, const at::Tensor& parameter,
                    kernels::BiasCorrections& by_age, std::vector<ActiveStates>& slots) {
  const at::Tensor gradient = parameter.grad().contiguous();
  const at::Tensor weights = parameter.detach();
  require(gradient.scalar_type() == weights.scalar_type() && gradient.sizes() == weights.sizes(),
          kSparseOptimizer, "gradient",
          to_text(gradient.scalar_type()) + " " + to_text(gradient.sizes()),
          "is not of the type and shape of its parameter");
  const int64_t size = weights.numel() / static_cast<int64_t>(slots.size());
  for (size_t slot = 0; slot < slots.size(); ++slot) {
    ActiveStates& states = slots[slot];
    const int64_t first = static_cast<int64_t>(slot) * size;
    const at::Tensor weight = weights.view({-1}).narrow(0, first, size);
    Call call;
    call.step = step;
    call.by_age = &by_age;
    call.entries = {states.positions.data(), size, states.block_starts.data()};
    call.weights.dtype = dtype_of(weight, kSparseOptimizer);
    call.weights.weight = mutable_data_of(weight);
    const at::Tensor slot_gradient = gradient.view({-1}).narrow(0, first, size);
    call.weights.grad = data_of(slot_gradient);
    if (weight.element_size() == 2) {
      if (!states.master.defined()) {
        const PackedMask none(states.positions.rows(), states.positions.cols());
        const Repacking all = repacking(none, states.positions, 0, size);
        states.master = new_states(states, weight);
        change_grown<float>(states.master, all, weight, 0,
                            [](float& value, float element) { value = element; });
      }
      call.weights.master = mutable_data_of(states.master);
    }
    step_slot(options, call, weight, states);
  }
}

/// Hides the gradients of some parameters while it lives.
class HiddenGradients {
 public:
  explicit HiddenGradients(std::vector<at::Tensor> parameters)
      : parameters_(std::move(parameters)) {
    for (const at::Tensor& parameter : parameters_) {
      gradients_.push_back(std::exchange(parameter.mutable_grad(), at::Tensor()));
    }
  }
  ~HiddenGradients() {
    for (size_t i = 0; i < parameters_.size(); ++i) {
      parameters_[i].mutable_grad() = gradients_[i];
    }
  }
  HiddenGradients(const HiddenGradients&) = delete;
  HiddenGradients& operator=(const HiddenGradients&) = delete;

 private:
  std::vector<at::Tensor> parameters_;
  std::vector<at::Tensor> gradients_;
};

template <typename Base>
struct OptionsOf;
template <>
struct OptionsOf<torch::optim::SGD> {
  using type = torch::optim::SGDOptions;
};
template <>
struct OptionsOf<torch::optim::Adam> {
  using type = torch::optim::AdamOptions;
};
template <>
struct OptionsOf<torch::optim::AdamW> {
  using type = torch::optim::AdamWOptions;
};

// ---- checkpoints --------------------------------------------------------------------------------
struct NamedState {
  const char* name;
  at::Tensor ActiveStates::*tensor;
};
constexpr NamedState kStates[] = {{"master", &ActiveStates::master},
                                  {"momentum", &ActiveStates::momentum},
                                  {"second_moment", &ActiveStates::second_moment},
                                  {"max_second_moment", &ActiveStates::max_second_moment},
                                  {"age", &ActiveStates::age}};

std::string key_of(size_t parameter, size_t slot, const std::string& name) {
  return to_text(parameter) + "_" + to_text(slot) + "_" + name;
}

at::Tensor words_of(const PackedMask& mask) {
  const at::Tensor words = at::empty({static_cast<int64_t>(mask.words().size())}, at::kLong);
  std::copy(mask.words().begin(), mask.words().end(),
            reinterpret_cast<uint64_t*>(words.mutable_data_ptr<int64_t>()));
  return words;
}

}  // namespace

void CompressedStates::compress(const at::Tensor& parameter, int64_t slot, PackedMask positions,
                                bool keeps_age) {
  use_libtorch_threads();
  require(holds(as_optimizer(), parameter), kSparseOptimizer, "parameter",
          to_text(parameter.sizes()), "is not one of this optimizer's");
  require(parameter.is_cpu() && parameter.is_contiguous(), kSparseOptimizer, "parameter",
          to_text(parameter.device()) + " with strides " + to_text(parameter.strides()),
          "is not contiguous host memory");
  dtype_of(parameter, kSparseOptimizer);
  const int64_t count = count_slots(parameter, slot);
  require(slot < count, kSparseOptimizer, "slot", slot,
          "is outside its parameter of " + to_text(count));
  const int64_t size = parameter.numel() / std::max<int64_t>(count, 1);
  require(positions.num_places() == size, kSparseOptimizer, "positions", positions.num_places(),
          "is not the number of elements of the weight, " + to_text(size));
  const bool has_states = as_optimizer().state().count(parameter.unsafeGetTensorImpl()) > 0;
  require(!has_states, kSparseOptimizer, "parameter", to_text(parameter.sizes()),
          "has states of all entries already; attach before its first step");
  Parameter* found = find(parameter);
  if (found == nullptr) {
    compressed_.push_back({parameter, 0, {}, {}});
    found = &compressed_.back();
    found->slots.resize(static_cast<size_t>(count));
    for (ActiveStates& states : found->slots) set_positions(states, PackedMask::full(1, size));
  }
  require(found->step == 0, kSparseOptimizer, "parameter", to_text(parameter.sizes()),
          "has made steps already; change its mask instead");
  require(static_cast<int64_t>(found->slots.size()) == count, kSparseOptimizer, "slot", slot,
          "does not go with the " + to_text(found->slots.size()) + " slots of its first weight");
  ActiveStates& states = found->slots[static_cast<size_t>(std::max<int64_t>(slot, 0))];
  set_positions(states, std::move(positions));
  const bool corrects = dynamic_cast<const torch::optim::SGD*>(&as_optimizer()) == nullptr;
  states.age = keeps_age && corrects ? at::zeros({num_active(states)}, at::kUInt16) : at::Tensor();
}

void CompressedStates::change_mask(const at::Tensor& parameter, int64_t slot, StateChange change) {
  Parameter* const found = find(parameter);
  require(found != nullptr, kSparseOptimizer, "parameter", to_text(parameter.sizes()),
          "has no compressed states");
  const auto index = static_cast<size_t>(std::max<int64_t>(slot, 0));
  require(index < found->slots.size(), kSparseOptimizer, "slot", slot,
          "is outside its parameter of " + to_text(found->slots.size()));
  ActiveStates& states = found->slots[index];
  require(change.positions.num_places() == states.positions.num_places(), kSparseOptimizer,
          "positions", change.positions.num_places(),
          "is not the number of elements of the weight, " + to_text(states.positions.num_places()));
  const bool needs_gradient =
      change.policy == GrownSecondMoment::kGradient && states.second_moment.defined();
  require(!needs_gradient || change.gradient.defined(), kSparseOptimizer, "gradient", "undefined",
          "is what grown second moments start with; pass it, or choose another policy");
  const c10::NoGradGuard no_grad;
  const at::Tensor weight = slot < 0 ? parameter.detach() : parameter.detach().select(0, slot);
  const int64_t first = change.first_row * weight.size(-1);
  const int64_t last =
      change.num_rows < 0 ? weight.numel() : first + change.num_rows * weight.size(-1);
  const Repacking plan = repacking(states.positions, change.positions, first, last);
  if (state_type(parameter) == at::kDouble) {
    repack<double>(states, weight, plan, change.policy, change.gradient, first);
  } else {
    repack<float>(states, weight, plan, change.policy, change.gradient, first);
  }
  set_positions(states, std::move(change.positions));
}

bool CompressedStates::is_compressed(const at::Tensor& parameter) const {
  return const_cast<CompressedStates*>(this)->find(parameter) != nullptr;
}

const ActiveStates& CompressedStates::active_states(const at::Tensor& parameter,
                                                    int64_t slot) const {
  const Parameter* const found = const_cast<CompressedStates*>(this)->find(parameter);
  require(found != nullptr, kSparseOptimizer, "parameter", to_text(parameter.sizes()),
          "has no compressed states");
  return found->slots.at(static_cast<size_t>(std::max<int64_t>(slot, 0)));
}

int64_t CompressedStates::state_bytes() const {
  size_t bytes = 0;
  for (const Parameter& parameter : compressed_) {
    for (const ActiveStates& states : parameter.slots) {
      bytes += states.positions.words().size() * sizeof(uint64_t) +
               states.block_starts.size() * sizeof(int64_t);
      for (const NamedState& state : kStates) {
        const at::Tensor& tensor = states.*state.tensor;
        if (tensor.defined()) bytes += tensor.storage().nbytes();
      }
    }
  }
  return static_cast<int64_t>(bytes);
}

CompressedStates::Parameter* CompressedStates::find(const at::Tensor& parameter) {
  for (Parameter& candidate : compressed_) {
    if (candidate.tensor.is_same(parameter)) return &candidate;
  }
  return nullptr;
}

void CompressedStates::write(torch::serialize::OutputArchive& archive) const {
  for (size_t p = 0; p < compressed_.size(); ++p) {
    const Parameter& parameter = compressed_[p];
    archive.write(to_text(p) + "_step", at::full({1}, parameter.step, at::kLong));
    for (size_t slot = 0; slot < parameter.slots.size(); ++slot) {
      const ActiveStates& states = parameter.slots[slot];
      archive.write(key_of(p, slot, "positions"), words_of(states.positions));
      for (const NamedState& state : kStates) {
        const at::Tensor& tensor = states.*state.tensor;
        if (!tensor.defined()) continue;
        // Archives know no unsigned numbers of 16 bits.
        archive.write(key_of(p, slot, state.name),
                      tensor.scalar_type() == at::kUInt16 ? tensor.to(at::kInt) : tensor);
      }
    }
  }
}

void CompressedStates::read(torch::serialize::InputArchive& archive) {
  std::vector<Parameter> loaded = compressed_;
  for (size_t p = 0; p < loaded.size(); ++p) {
    at::Tensor step;
    require(archive.try_read(to_text(p) + "_step", step), kSparseOptimizer, "archive",
            to_text(p) + " parameters",
            "are fewer than the " + to_text(loaded.size()) + " that are compressed");
    loaded[p].step = step.item<int64_t>();
    for (size_t slot = 0; slot < loaded[p].slots.size(); ++slot) {
      ActiveStates& states = loaded[p].slots[slot];
      at::Tensor words;
      const bool has_mask = archive.try_read(key_of(p, slot, "positions"), words);
      require(has_mask && words.equal(words_of(states.positions)), kSparseOptimizer, "archive",
              "parameter " + to_text(p) + ", slot " + to_text(slot),
              "has states of another mask; load the Sparsifier first");
      for (const NamedState& state : kStates) {
        at::Tensor tensor;
        if (!archive.try_read(key_of(p, slot, state.name), tensor)) tensor = at::Tensor();
        const bool is_age = state.tensor == &ActiveStates::age;
        states.*state.tensor = tensor.defined() && is_age ? tensor.to(at::kUInt16) : tensor;
        require(!tensor.defined() || tensor.numel() == num_active(states), kSparseOptimizer,
                "archive", key_of(p, slot, state.name),
                "has not one element for each active weight");
      }
    }
  }
  compressed_ = std::move(loaded);
}

template <typename Base>
at::Tensor WithCompressedStates<Base>::step(torch::optim::Optimizer::LossClosure closure) {
  const c10::NoGradGuard no_grad;
  at::Tensor loss;
  if (closure) {
    const c10::AutoGradMode with_grad(true);
    loss = closure();
  }
  {
    std::vector<at::Tensor> hidden;
    for (const Parameter& parameter : compressed_) hidden.push_back(parameter.tensor);
    const HiddenGradients hide(std::move(hidden));
    Base::step();
  }
  for (torch::optim::OptimizerParamGroup& group : this->param_groups()) {
    using Options = typename OptionsOf<Base>::type;
    const auto& options = static_cast<const Options&>(group.options());
    for (const at::Tensor& tensor : group.params()) {
      Parameter* const parameter = this->find(tensor);
      if (parameter == nullptr || !tensor.grad().defined()) continue;
      ++parameter->step;
      step_parameter(options, parameter->step, tensor, parameter->by_age, parameter->slots);
    }
  }
  return loss;
}

template <typename Base>
void WithCompressedStates<Base>::save(torch::serialize::OutputArchive& archive) const {
  Base::save(archive);
  torch::serialize::OutputArchive states(archive.compilation_unit());
  this->write(states);
  archive.write("compressed", states);
}

template <typename Base>
void WithCompressedStates<Base>::load(torch::serialize::InputArchive& archive) {
  torch::serialize::InputArchive states;
  require(archive.try_read("compressed", states), kSparseOptimizer, "archive", "given",
          "has no compressed states; it was saved by another optimizer");
  this->read(states);
  Base::load(archive);
}

template class WithCompressedStates<torch::optim::SGD>;
template class WithCompressedStates<torch::optim::Adam>;
template class WithCompressedStates<torch::optim::AdamW>;

}  // namespace perseid
