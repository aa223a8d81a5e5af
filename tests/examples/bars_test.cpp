// The bars of the mixture of domains, on the whole of Fashion-MNIST. Skipped where it is absent.
#include <gtest/gtest.h>

#include <optional>

#include "examples/train_fashion/train.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

// The published protocol: 6 epochs. Single .453, hash .433, a learned gate with 2 experts above
// .80.
TEST(Bars, LearnedGatesBeatBlindOnes) {
  const std::optional<FashionMnist> images = whole_fashion_mnist();
  if (!images) GTEST_SKIP() << "Fashion-MNIST is absent; get it with: examples/get_data.sh fashion";
  const DomainData data = make_domains(*images, 0);
  const auto accuracy = [&](GateKind gate) {
    TrainOptions options;
    options.gate = gate;
    const RunResult result = train_domains(comm::self_group(), data, options);
    EXPECT_EQ(result.num_steps, 1404);
    return result.accuracy;
  };
  EXPECT_NEAR(accuracy(GateKind::kSingle), .453, .02);
  EXPECT_NEAR(accuracy(GateKind::kHash), .433, .02);
  EXPECT_GE(accuracy(GateKind::kTopK), .80);
  EXPECT_GE(accuracy(GateKind::kDense), .80);
}

}  // namespace
}  // namespace perseid::examples
