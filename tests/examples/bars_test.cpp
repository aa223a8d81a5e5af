// The bars of the mixture of domains, on the whole of Fashion-MNIST. Skipped where it is absent.
#include <gtest/gtest.h>

#include <optional>

#include "examples/train_fashion/train.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

// The recipe of the defaults, 6 epochs: blind gates near .47, each learned one above .83 with at
// most 8 experts, COMET with about 2.
TEST(Bars, LearnedGatesBeatBlindOnes) {
  const std::optional<FashionMnist> images = whole_fashion_mnist();
  if (!images) GTEST_SKIP() << "Fashion-MNIST is absent; get it with: examples/get_data.sh fashion";
  const DomainData data = make_domains(*images, 0);
  const auto run = [&](GateKind gate) {
    TrainOptions options;
    options.gate = gate;
    const RunResult result = train_domains(comm::self_group(), data, options);
    EXPECT_EQ(result.num_steps, 1404);
    return result;
  };
  EXPECT_NEAR(run(GateKind::kSingle).accuracy, .47, .02);
  EXPECT_NEAR(run(GateKind::kHash).accuracy, .48, .02);
  const RunResult oracle = run(GateKind::kOracle);
  EXPECT_GE(oracle.accuracy, .82);
  EXPECT_NEAR(oracle.domain_nmi, 1, 1e-3);
  EXPECT_GE(run(GateKind::kTopK).accuracy, .83);
  EXPECT_GE(run(GateKind::kDense).accuracy, .83);
  for (const GateKind gate : {GateKind::kDSelectK, GateKind::kComet}) {
    const RunResult result = run(gate);
    EXPECT_GE(result.accuracy, .83) << gate_name(gate);
    EXPECT_LE(result.experts_per_token, 2.2) << gate_name(gate);
    EXPECT_LE(result.rows_per_token, 4) << gate_name(gate);  // skipped in training too
  }
}

}  // namespace
}  // namespace perseid::examples
