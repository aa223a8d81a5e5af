// dselect_k: one warp a token, see kernels/dselect_k_warp.cuh. Reads T*K*(bits+1) and writes T*E
// elements. DSelectKMemory of a token: the shares of the bits and a table of E values, in shared
// memory up to 40 KB. With an expert map the products of soft selectors are formed once more, in
// the order of the experts. Sums in the type of the logits, over tokens in double, all in a fixed
// order. Limit: 2^31 - 1 values of a token.
#include "kernels/cuda_launchers.h"
#include "kernels/dselect_k_warp.cuh"
#include "kernels/expert_chain.cuh"

namespace perseid::kernels {
namespace {

template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kHasSums = true;
  DSelectKCall<T> call;
  const int32_t* chain;  ///< of codes, see expert_chain_kernel; null: each code has its own expert
  T* weights;
  bool needs_entropy;

  __device__ TokenSums operator()(int64_t t, T* at) const {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    const int E = call.num_experts, lane = TokenWarp::lane();
    const DSelectKMemory<T> memory(call, at);
    const T* const logits = call.logits + t * call.row_size();
    T* const row = weights == nullptr ? nullptr : weights + t * E;
    TokenSums sums;
    if (!call.is_valid(t)) {
      if (row != nullptr) fill_row(row, E, T{0});
      return sums;
    }
    const SelectorFacts facts = read_selector_row<false>(call, logits, memory);
    sums.of[kNonFinite] = facts.is_non_finite ? 1 : 0;
    if (facts.has_nan) {
      sums.of[kEntropy] = sums.of[kPenalty] = sums.of[kRemoved] = static_cast<double>(kNaN);
      if (row == nullptr) return sums;
      for (int j = lane; j < E; j += kWarpSize) row[j] = j < call.num_selectors ? kNaN : T{0};
      return sums;
    }
    sums.of[kSwitches] = call.num_switches();
    sums.of[kSaturated] = static_cast<double>(facts.saturated);
    if (row != nullptr) {
      share_weight(call, logits + call.num_switches(), memory);
      fill_row(memory.table, E, T{0});
    }
    for (int i = 0; i < call.num_selectors; ++i) add_selector(i, memory, sums);
    if (row == nullptr) return sums;
    if (chain != nullptr) merge(memory);
    T total = 0;
    for (int j = lane; j < E; j += kWarpSize) total += memory.table[j];
    total = TokenWarp::sum(total);
    const T divisor = call.is_renormalized && total > T{0} ? total : T{1};
    double removed = 0;
    PERSEID_ROLLED
    for (int j = lane; j < E; j += kWarpSize) {
      const T g = memory.table[j] / divisor;
      const bool is_removed = g < call.min_weight;
      row[j] = is_removed ? T{0} : g;
      removed += is_removed ? static_cast<double>(g) : 0.0;
    }
    sums.of[kRemoved] = TokenWarp::sum(removed);
    return sums;
  }

  /// Its losses, and its share of the weights unless those are not wanted.
  __device__ __forceinline__ void add_selector(int i, const DSelectKMemory<T>& memory,
                                               TokenSums& sums) const {
    const DSelectKCodes<T> codes(call, memory, i);
    const T alpha = weights == nullptr ? T{0} : memory.alpha[i];
    T mass = 0, entropy = 0;
    LargestOfWarp<T> largest;
    PERSEID_ROLLED
    for (int j = TokenWarp::lane(); j < call.num_experts; j += kWarpSize) {
      const T r = codes.reach(j);
      mass += r;
      if (needs_entropy) entropy += r * log_of(r + static_cast<T>(kEntropyEpsilon));
      if (call.is_hard) {
        largest.add(r, j);
      } else if (weights != nullptr && chain == nullptr) {
        memory.table[j] += alpha * r;
      }
    }
    mass = TokenWarp::sum(mass);
    sums.of[kPenalty] += 1 / (kPenaltyEpsilon + static_cast<double>(mass));
    if (needs_entropy) sums.of[kEntropy] -= static_cast<double>(TokenWarp::sum(entropy));
    if (!call.is_hard || weights == nullptr) return;
    largest.join();
    if (!(largest.value > T{0})) return;
    const int expert = call.expert_of(i, largest.index);
    if (expert % kWarpSize == TokenWarp::lane()) memory.table[expert] += alpha;
  }

  /// The weights of soft selectors with a map: each lane gathers those of its experts.
  __device__ __forceinline__ void merge(const DSelectKMemory<T>& memory) const {
    const int E = call.num_experts, num_codes = E * call.num_selectors;
    PERSEID_ROLLED
    for (int m = TokenWarp::lane(); m < E; m += kWarpSize) {
      T sum = 0;
      PERSEID_ROLLED
      for (int code = chain[m]; code < num_codes; code = chain[E + code]) {
        const int i = code / E;
        sum += memory.alpha[i] * DSelectKCodes<T>(call, memory, i).reach_of_any(code - i * E);
      }
      memory.table[m] = sum;
    }
  }
};

}  // namespace

void cuda::dselect_k(const DSelectKShape& shape, const DSelectKOptions& options, DType dtype,
                     const DSelectKInput& input, const DSelectKOutput& output,
                     const Stream& stream) {
  DeviceMemory chain;
  dispatch_float_dtype(dtype, "dselect_k", [&](auto tag) {
    using T = decltype(tag);
    const DSelectKCall<T> call = make_dselect_k_call<T>(shape, options, input);
    const bool is_merged = output.weights != nullptr && !options.hard_eval;
    if (input.expert_map != nullptr && is_merged && shape.num_tokens > 0) {
      chain =
          expert_chain("dselect_k", input.expert_map, call.num_selectors, call.num_experts, stream);
    }
    const TokenSumTargets targets{
        {output.entropy_sum, output.penalty_sum, output.removed_weight},
        {output.num_switches, output.saturated_switches, output.non_finite_tokens}};
    for_each_token("dselect_k",
                   Forward<T>{call, chain.as<int32_t>(), static_cast<T*>(output.weights),
                              output.entropy_sum != nullptr},
                   shape.num_tokens, elements_forward(call), targets, stream);
  });
}

}  // namespace perseid::kernels
