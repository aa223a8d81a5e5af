#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace perseid::gates {

// Tables for HashGate with HashMode::kTable: int32 [V] on the CPU, the expert of each key 0 .. V-1.
// Pure functions of their arguments, equal on every rank and for any number of threads. The
// clusters of a caller are a table as they are, if their ids are below num_experts.

/// Experts with equal shares of the training data: keys by falling frequency (equal: smaller key
/// first), each to the expert with the least load so far (equal: smallest id). Keys of frequency 0
/// go where kernels::hash_bucket with `seed` sends them. The loads, sums of frequencies, then
/// differ by at most the largest frequency. O(V log(V E)).
/// @param frequencies  [V] any integer type, >= 0, with a sum below 2^63: how often each key occurs
at::Tensor balanced_hash_table(const at::Tensor& frequencies, int64_t num_experts,
                               uint64_t seed = 0);

/// Similar keys to one expert (clustered hash layers, Roller et al. 2021): the id of a key's
/// k-means cluster, k = num_experts. Starts from k-means++ with draws keyed by `seed`, then Lloyd's
/// iterations in float64 until no key moves, at most `max_iterations`. Equal distances go to the
/// smaller id; a cluster that loses all keys keeps its centre, so experts may stay without keys.
/// O(V E D) for each iteration.
/// @param features  [V, D] floating, finite: an embedding of each key
at::Tensor clustered_hash_table(const at::Tensor& features, int64_t num_experts, uint64_t seed = 0,
                                int64_t max_iterations = 100);

/// Similar keys to different experts (dispersed hash layers): the members of each cluster, in an
/// order drawn by `seed`, are dealt to the experts in turn, and a cluster goes on where the one
/// before it ended. So the numbers of keys of any one cluster differ by at most 1 between experts,
/// and so do those of all keys. O(V log V).
/// @param clusters  [V] any integer type, any numbers: equal ones are a cluster
at::Tensor dispersed_hash_table(const at::Tensor& clusters, int64_t num_experts, uint64_t seed = 0);

}  // namespace perseid::gates
