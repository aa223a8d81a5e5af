// Steps of optimizers on active entries against their references, with and without a master copy,
// for any thread count the same bits; inactive entries are NaN and stay as they are; by hand.
#include "kernels/active_step.h"

#include "tests/kernels/kernels_test.h"

namespace perseid::kernels::testing {
namespace {

template <typename T>
class ActiveStepTyped : public ::testing::Test {};
using Types = ::testing::Types<float, double, BFloat16, Float16>;
TYPED_TEST_SUITE(ActiveStepTyped, Types);

/// A weight, its gradient and states; inactive entries are NaN.
template <typename T>
struct Problem {
  using A = Accumulate<T>;
  Problem(int64_t size, uint32_t divisor) : num_positions(size) {
    std::mt19937_64 random(divisor);
    bits.assign(static_cast<size_t>((size + 63) / 64), 0);
    weight = normal_values<T>(size, 1);
    grad = normal_values<T>(size, 2);
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (random() % divisor == 0) {
        bits[static_cast<size_t>(i / 64)] |= uint64_t{1} << (i % 64);
        ++count;
      } else {
        weight[static_cast<size_t>(i)] = grad[static_cast<size_t>(i)] =
            make<T>(std::numeric_limits<double>::quiet_NaN());
      }
    }
    master = normal_values<A>(count, 3);
    momentum = normal_values<A>(count, 4);
    second = normal_values<A>(count, 5);
    for (A& v : second) v = v * v;
    largest = second;
    age.assign(static_cast<size_t>(count), 0);
    for (size_t i = 0; i < age.size(); ++i) {
      age[i] = static_cast<uint16_t>(i % 3 == 0 ? 65535 : i % 40);
    }
    starts.resize(static_cast<size_t>(num_active_blocks(size) + 1));
    count_active_blocks(bits.data(), size, starts.data());
    EXPECT_EQ(starts.back(), count);
  }
  ActiveEntries entries() const { return {bits.data(), num_positions, starts.data()}; }
  StepWeights weights(bool has_master) {
    return {DTypeOf<T>::value, weight.data(), grad.data(), has_master ? master.data() : nullptr};
  }
  int64_t num_positions;
  std::vector<uint64_t> bits;
  std::vector<int64_t> starts;
  std::vector<T> weight, grad;
  std::vector<A> master, momentum, second, largest;
  std::vector<uint16_t> age;
};

template <typename T>
void expect_equal(const Problem<T>& actual, const Problem<T>& expected, const std::string& what) {
  using A = Accumulate<T>;
  expect_close(actual.weight, expected.weight, tolerance<T>(), what);
  expect_close(actual.master, expected.master, tolerance<A>(), what);
  expect_close(actual.momentum, expected.momentum, tolerance<A>(), what);
  expect_close(actual.second, expected.second, tolerance<A>(), what);
  expect_close(actual.largest, expected.largest, tolerance<A>(), what);
  EXPECT_EQ(actual.age, expected.age);
}

/// run(problem, is_reference) against the reference and for all thread counts.
template <typename T, typename Run>
void compare(const Run& run) {
  for (const int64_t size : {0, 1, 65, 2048, 20'003}) {
    for (const uint32_t divisor : {1u, 30u}) {
      Problem<T> expected(size, divisor);
      run(expected, true);
      std::vector<T> first;
      for (const int count : {1, 3}) {
        const Threads threads(count);
        Problem<T> actual(size, divisor);
        run(actual, false);
        expect_equal(actual, expected, "size " + std::to_string(size));
        if (first.empty()) first = actual.weight;
        EXPECT_TRUE(same_bits(actual.weight, first));
      }
    }
  }
}

TYPED_TEST(ActiveStepTyped, Sgd) {
  using T = TypeParam;
  for (const bool has_master : {false, true}) {
    for (int variant = 0; variant < 4; ++variant) {
      SgdStep step;
      step.lr = 0.1;
      step.weight_decay = variant == 1 ? 0 : 0.01;
      step.momentum = variant == 0 ? 0 : 0.9;
      step.dampening = variant == 1 ? 0.2 : 0;
      step.nesterov = variant == 2;
      step.is_first = variant == 3;
      compare<T>([&](Problem<T>& problem, bool is_reference) {
        (is_reference
             ? sgd_active_step_reference(problem.entries(), step, problem.weights(has_master),
                                         problem.momentum.data())
             : sgd_active_step(problem.entries(), step, problem.weights(has_master),
                               problem.momentum.data()));
      });
    }
  }
}

TYPED_TEST(ActiveStepTyped, Adam) {
  using T = TypeParam;
  for (const bool has_master : {false, true}) {
    for (int variant = 0; variant < 4; ++variant) {
      AdamStep step;
      step.lr = 0.1;
      step.beta1 = 0.9;
      step.beta2 = 0.999;
      step.eps = 1e-8;
      step.weight_decay = 0.01;
      step.is_decoupled = variant % 2 == 1;
      step.step = variant == 0 ? 1 : 70'000;
      compare<T>([&](Problem<T>& problem, bool is_reference) {
        AdamStates states;
        states.momentum = problem.momentum.data();
        states.second_moment = problem.second.data();
        if (variant == 2) states.max_second_moment = problem.largest.data();
        BiasCorrections by_age;
        by_age.extend(step);
        if (variant == 3) states.age = problem.age.data();
        states.by_age = &by_age;
        (is_reference
             ? adam_active_step_reference(problem.entries(), step, problem.weights(has_master),
                                          states)
             : adam_active_step(problem.entries(), step, problem.weights(has_master), states));
      });
    }
  }
}

TEST(ActiveStep, ByHand) {
  // Positions 1 and 3 of 4; SGD of rate 1/2 with momentum 1/2: buffer 1/2 * 4 + g, w - buffer / 2.
  const uint64_t bits = 0b1010;
  int64_t starts[2];
  count_active_blocks(&bits, 4, starts);
  EXPECT_EQ(starts[1], 2);
  float weight[] = {7, 1, 7, 2}, buffer[] = {4, 8};
  const float grad[] = {9, 1, 9, 3};
  SgdStep step;
  step.lr = step.momentum = 0.5;
  sgd_active_step({&bits, 4, starts}, step, {DType::kFloat32, weight, grad, nullptr}, buffer);
  EXPECT_EQ(std::vector<float>(buffer, buffer + 2), (std::vector<float>{3, 7}));
  EXPECT_EQ(std::vector<float>(weight, weight + 4), (std::vector<float>{7, -0.5, 7, -1.5}));
}

TEST(ActiveStep, Refused) {
  const uint64_t bits = 1;
  const int64_t starts[] = {0, 1};
  float value = 0;
  const ActiveEntries entries{&bits, 1, starts};
  EXPECT_EQ(config_error([&] {
              adam_active_step(entries, {}, {DType::kFloat32, &value, &value, nullptr}, {});
            }),
            "[adam_active_step] momentum=null but 1 elements are needed; pass a buffer");
  EXPECT_EQ(config_error([&] {
              sgd_active_step(entries, {}, {DType::kInt32, &value, &value, nullptr}, nullptr);
            }),
            "[sgd_active_step] dtype=int32 is not supported; choose bf16, fp16, fp32 or fp64");
  EXPECT_NE(config_error([&] {
              sgd_active_step(entries, {}, {DType::kFloat32, &value, &value, nullptr}, nullptr,
                              {Device::kCuda});
            }),
            "no ConfigError");
}

}  // namespace
}  // namespace perseid::kernels::testing
