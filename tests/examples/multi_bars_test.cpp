// The bars of Multi-Fashion-MNIST, small protocol, on the whole of Fashion-MNIST. Skipped where it
// is absent.
#include <gtest/gtest.h>

#include <optional>
#include <utility>

#include "examples/train_fashion/multi_train.h"
#include "tests/examples/fixture.h"

namespace perseid::examples {
namespace {

// Accuracy hardly tells gates apart here; one expert for all gets .81 and .80.
TEST(MultiBars, SmallProtocol) {
  std::optional<FashionMnist> images = whole_fashion_mnist();
  if (!images) GTEST_SKIP() << "Fashion-MNIST is absent; get it with: examples/get_data.sh fashion";
  const MultiData data = make_multi(std::move(*images), Protocol::kSmall, 0);
  MultiOptions options = multi_defaults(Protocol::kSmall);
  options.train.gate = GateKind::kComet;
  const MultiResult result = train_multi(comm::self_group(), data, options);
  EXPECT_EQ(result.num_steps, 936);
  EXPECT_GE(result.test.tasks[0].accuracy, .81);
  EXPECT_GE(result.test.tasks[1].accuracy, .80);
  EXPECT_LE(result.test.rows_per_sample, 4.5);  // fewer than with all six experts
}

}  // namespace
}  // namespace perseid::examples
