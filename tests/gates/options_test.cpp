// Every option of every gate, out of its range: ConfigError with operation, argument, value, limit.
//   Sizes         num_experts, d_model and top_k of all gates with a router: 0, negative, too
//   large,
//                 products that overflow
//   Coefficients  of losses: negative, NaN, infinite
//   the rest      one table for each gate
#include <cmath>
#include <limits>

#include "gates/baseline_gates.h"
#include "gates/comet_gate.h"
#include "gates/gshard_gate.h"
#include "gates/hash_gate.h"
#include "gates/noisy_top_k_gate.h"
#include "gates/remoe_gate.h"
#include "tests/gates/gate_test.h"
#include "tests/refused.h"

namespace perseid::testing {
namespace {

using namespace gates;

constexpr int64_t kTooMany = int64_t{1} << 31;
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
const char* const kNotFrom0 = "is not a finite number from 0 on";

/// Makes a gate of width 4 with 8 experts after `change`.
template <typename GateType, typename Options>
struct Table {
  const char* operation;
  std::vector<Refused> rows;

  Table& add(const std::function<void(Options&)>& change, const std::string& argument,
             const std::string& value, const std::string& limit) {
    const auto make = [change] {
      Options options(4, 8);
      change(options);
      GateType gate(options);
    };
    rows.push_back({make, operation, argument, value, limit});
    return *this;
  }
};
using TopKTable = Table<TopKGate, TopKGateOptions>;
using NoisyTable = Table<NoisyTopKGate, NoisyTopKGateOptions>;
using GShardTable = Table<GShardGate, GShardGateOptions>;
using ReMoETable = Table<ReMoEGate, ReMoEGateOptions>;
using CometTable = Table<CometGate, CometGateOptions>;

template <typename TableType>
void expect_sizes(const char* operation, const char* product, const char* product_value) {
  TableType table{operation, {}};
  for (const int64_t n : {int64_t{0}, int64_t{-1}, -kLargest}) {
    table.add([=](auto& o) { o.num_experts(n); }, "num_experts", to_text(n), "is below 1");
    table.add([=](auto& o) { o.d_model(n); }, "d_model", to_text(n), "is below 1");
  }
  for (const int64_t n : {kTooMany, kLargest}) {
    table.add([=](auto& o) { o.num_experts(n); }, "num_experts", to_text(n), "2147483647");
    table.add([=](auto& o) { o.d_model(n); }, "d_model", to_text(n), "2147483647");
  }
  table.add([](auto& o) { o.num_experts(1 << 30).d_model(1 << 30); }, product, product_value,
            "is more than 2^40 elements");
  expect_refused(table.rows);
}

template <typename TableType>
void expect_top_k(const char* operation) {
  TableType table{operation, {}};
  for (const int64_t n : {int64_t{0}, int64_t{-1}, -kLargest}) {
    table.add([=](auto& o) { o.top_k(n); }, "top_k", to_text(n), "choose top_k in [1, 8]");
  }
  for (const int64_t n : {int64_t{9}, kLargest}) {
    table.add([=](auto& o) { o.top_k(n); }, "top_k", to_text(n),
              "exceeds num_experts=8; choose top_k in [1, 8]");
  }
  expect_refused(table.rows);
}

TEST(GateOptions, Sizes) {
  const char* const product = "num_experts*d_model";
  const char* const value = "[1073741824, 1073741824]";
  expect_sizes<TopKTable>("top_k_gate", product, value);
  expect_sizes<NoisyTable>("noisy_top_k_gate", product, value);
  expect_sizes<GShardTable>("gshard_gate", product, value);
  expect_sizes<ReMoETable>("remoe_gate", product, value);
  expect_sizes<CometTable>("comet_gate", "top_k*num_experts*d_model",
                           "[2, 1073741824, 1073741824]");
  expect_top_k<TopKTable>("top_k_gate");
  expect_top_k<NoisyTable>("noisy_top_k_gate");
  expect_top_k<ReMoETable>("remoe_gate");
  expect_top_k<CometTable>("comet_gate");
}

TEST(GateOptions, Coefficients) {
  for (const double c : {-1., -1e-300, double(NAN), double(INFINITY), -double(INFINITY)}) {
    const std::string value = to_text(c);
    TopKTable top_k{"top_k_gate", {}};
    top_k.add([=](auto& o) { o.aux_loss_coeff(c); }, "aux_loss_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.z_loss_coeff(c); }, "z_loss_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.balance_coeff(c); }, "balance_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.bias_update_rate(c); }, "bias_update_rate", value, kNotFrom0);
    NoisyTable noisy{"noisy_top_k_gate", {}};
    noisy.add([=](auto& o) { o.importance_coeff(c); }, "importance_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.load_coeff(c); }, "load_coeff", value, kNotFrom0);
    GShardTable gshard{"gshard_gate", {}};
    gshard.add([=](auto& o) { o.aux_loss_coeff(c); }, "aux_loss_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.z_loss_coeff(c); }, "z_loss_coeff", value, kNotFrom0);
    CometTable comet{"comet_gate", {}};
    comet.add([=](auto& o) { o.entropy_coeff(c); }, "entropy_coeff", value, kNotFrom0)
        .add([=](auto& o) { o.balance_coeff(c); }, "balance_coeff", value, kNotFrom0);
    for (const auto& rows : {top_k.rows, noisy.rows, gshard.rows, comet.rows}) expect_refused(rows);
  }
}

TEST(GateOptions, TopK) {
  TopKTable table{"top_k_gate", {}};
  for (const double x : {0., -1., double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.route_scale(x); }, "route_scale", to_text(x),
              "is not a finite number above 0; choose 1");
  }
  for (const double x : {1., -.1, double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.jitter_eps(x); }, "jitter_eps", to_text(x), "is outside [0, 1)");
  }
  for (const int64_t n : {int64_t{3}, int64_t{0}, int64_t{-2}, int64_t{16}, kLargest}) {
    table.add([=](auto& o) { o.num_groups(n); }, "num_groups", to_text(n),
              "does not divide num_experts=8 into equal groups");
  }
  for (const int64_t n : {int64_t{0}, int64_t{-1}, int64_t{5}, kLargest}) {
    table.add([=](auto& o) { o.num_groups(4).topk_groups(n); }, "topk_groups", to_text(n),
              "is outside [1, num_groups=4]");
  }
  table.add([](auto& o) { o.top_k(5).num_groups(4).topk_groups(2); }, "top_k", "5",
            "exceeds the 4 experts of topk_groups=2 groups; use more groups");
  table.add([](auto& o) { o.num_groups(8).topk_groups(2).bias_update_rate(1e-3); }, "num_groups",
            "8", "leaves 1 expert in a group, but the two best rank it; choose at most 4");
  expect_refused(table.rows);
}

TEST(GateOptions, Noisy) {
  NoisyTable table{"noisy_top_k_gate", {}};
  for (const double x : {0., -1., double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.noise_epsilon(x); }, "noise_epsilon", to_text(x),
              "is not a finite number above 0");
    table.add([=](auto& o) { o.noise(RouterNoise::kFixed).noise_std(x); }, "noise_std", to_text(x),
              "is not a finite number above 0");
  }
  expect_refused(table.rows);
}

TEST(GateOptions, GShard) {
  GShardTable table{"gshard_gate", {}};
  for (const double x : {-.1, 1.1, double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.second_threshold(x); }, "second_threshold", to_text(x),
              "is outside [0, 1]");
  }
  expect_refused(table.rows);
}

TEST(GateOptions, ReMoE) {
  ReMoETable table{"remoe_gate", {}};
  for (const double x : {0., -1., 1e-13, 101., double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.l1_coeff_start(x); }, "l1_coeff_start", to_text(x),
              "is outside [1e-12, 100]");
  }
  for (const double x : {1., .5, -2., double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.l1_coeff_factor(x); }, "l1_coeff_factor", to_text(x),
              "is not a finite number above 1");
  }
  expect_refused(table.rows);
}

TEST(GateOptions, Comet) {
  CometTable table{"comet_gate", {}};
  for (const double x : {0., -1., double(NAN), double(INFINITY), 1e-60, 1e60}) {
    table.add([=](auto& o) { o.gamma(x); }, "gamma", to_text(x), "is not a finite number above 0");
  }
  for (const double x : {-.1, .125, 1., double(NAN)}) {
    table.add([=](auto& o) { o.min_weight(x); }, "min_weight", to_text(x),
              "is outside [0, 1/num_experts=0.125)");
  }
  for (const double x : {-.1, 1.5, double(NAN), double(INFINITY)}) {
    table.add([=](auto& o) { o.entropy_schedule({x}); }, "schedule.ramp_until", to_text(x),
              "is outside [0, 1]");
  }
  expect_refused(table.rows);
}

TEST(GateOptions, FixedGates) {
  const auto table_of = [](const Tensor& values) {
    return [values] { HashGate(HashGateOptions(8).mode(HashMode::kTable).table(values)); };
  };
  const char* const hash = "hash_gate";
  expect_refused({
      {[] { HashGate(HashGateOptions(0)); }, hash, "num_experts", "0", "is below 1"},
      {[] { HashGate(HashGateOptions(-3)); }, hash, "num_experts", "-3", "is below 1"},
      {[] { HashGate(HashGateOptions(kTooMany)); }, hash, "num_experts", "2147483648",
       "exceeds 2147483647"},
      {[] { HashGate(HashGateOptions(8).table(at::zeros({3}, at::kLong))); }, hash, "table",
       "Long[3]", "is given, but mode=random does not read it; choose mode=table"},
      {[] { HashGate(HashGateOptions(8).num_hashes(0)); }, hash, "num_hashes", "0",
       "is outside [1, num_experts=8]"},
      {[] { HashGate(HashGateOptions(8).num_hashes(9)); }, hash, "num_hashes", "9",
       "is outside [1, num_experts=8]"},
      {table_of({}), hash, "table", "undefined", "is needed with mode=table"},
      {table_of(at::zeros({0}, at::kLong)), hash, "table", "Long[0]", "V >= 1"},
      {table_of(at::zeros({3})), hash, "table", "Float[3]", "is not an integer [V] tensor"},
      {table_of(at::zeros({3}, at::kBool)), hash, "table", "Bool[3]", "integer [V]"},
      {table_of(at::zeros({3, 2}, at::kLong)), hash, "table", "Long[3, 2]", "integer [V]"},
      {table_of(at::zeros({3}, at::TensorOptions(at::kLong).device(at::kMeta))), hash,
       "table.device", "meta", "move it to the CPU"},
      {table_of(at::tensor({0, 9, 1}, at::kLong)), hash, "table[1]", "9",
       "is outside [0, num_experts=8)"},
      {table_of(at::tensor({0, 7, -1}, at::kLong)), hash, "table[2]", "-1",
       "is outside [0, num_experts=8)"},
      {[] { SingleGate(5, 5); }, "single_gate", "expert", "5", "is outside [0, num_experts=5)"},
      {[] { SingleGate(5, -1); }, "single_gate", "expert", "-1", "is outside [0, num_experts=5)"},
      {[] { SingleGate(0); }, "single_gate", "num_experts", "0", "is below 1"},
      {[] { SingleGate(kTooMany, 0); }, "single_gate", "num_experts", "2147483648", "2147483647"},
      {[] { DenseGate(TopKGateOptions(4, 0)); }, "dense_gate", "num_experts", "0", "is below 1"},
      {[] { DenseGate(TopKGateOptions(0, 4)); }, "top_k_gate", "d_model", "0", "is below 1"},
  });
}

}  // namespace
}  // namespace perseid::testing
