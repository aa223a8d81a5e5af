#pragma once
#include <cstdint>

// What tests of exchanges send, and how much to whom.

namespace perseid::testing {

/// Column `column` of row `row` from rank `source` to rank `target`: unique, exact in double.
inline double value(int64_t source, int64_t target, int64_t row, int64_t column) {
  return static_cast<double>(((source * 16 + target) * 4096 + row) * 16 + column) + 0.5;
}

/// Even and uneven rows, none for rank 1, none at all, all to rank 0.
enum class Shape { kEven, kUneven, kOneIdle, kNothing, kHot };
inline constexpr Shape kShapes[] = {Shape::kEven, Shape::kUneven, Shape::kOneIdle, Shape::kNothing,
                                    Shape::kHot};

inline int64_t rows_of(Shape shape, int source, int target) {
  switch (shape) {
    case Shape::kEven:
      return 3;
    case Shape::kUneven:
      return (source * 3 + target * 5 + 1) % 7;
    case Shape::kOneIdle:
      return source == 1 || target == 1 ? 0 : 2 + source;
    case Shape::kNothing:
      return 0;
    case Shape::kHot:
      return target == 0 ? 2 + source : 0;
  }
  return 0;
}

}  // namespace perseid::testing
