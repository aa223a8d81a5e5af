// assign: rows are added one by one. A row looks for the cheapest chain of moves that ends in a
// column with room: Dijkstra over columns, where column c leads to column d by the row of c that
// moves there at the least reduced cost. A search settles at most C columns and reads the costs of
// their rows once, so at most R C numbers. Duals keep reduced costs from falling below 0.
#include "kernels/assignment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/checks.h"
#include "kernels/cuda_launchers.h"

namespace perseid::kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check(const char* operation, const AssignmentShape& shape, const void* cost,
           const int32_t* column_of_row) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  require_count(operation, "num_rows", shape.num_rows);
  require(shape.num_columns >= 0 && shape.num_columns <= kMax, operation, "num_columns",
          shape.num_columns, "is outside [0, " + to_text(kMax) + "]");
  require_buffer(operation, "cost", cost, shape.num_rows * shape.num_columns);
  require_buffer(operation, "column_of_row", column_of_row, shape.num_rows);
}

/// Capacities as given, or 1 each; throws unless they have room for all rows.
std::vector<int64_t> checked_capacities(const AssignmentShape& shape, const int64_t* capacity) {
  std::vector<int64_t> result(static_cast<size_t>(shape.num_columns), 1);
  if (capacity != nullptr) std::copy_n(capacity, shape.num_columns, result.begin());
  int64_t room = 0;
  for (int64_t& rows : result) {
    require_count("assign", "capacity", rows);
    rows = std::min(rows, shape.num_rows);  // so that the sum cannot overflow
    room += rows;
  }
  require(room >= shape.num_rows, "assign", "capacity", room,
          "in all is below num_rows=" + to_text(shape.num_rows) + "; give the columns more room");
  return result;
}

void check_costs(const AssignmentShape& shape, const double* cost) {
  for (int64_t i = 0; i < shape.num_rows * shape.num_columns; ++i) {
    if (cost[i] > -kInfinity) continue;  // false for NaN
    const std::string argument =
        "cost[" + to_text(i / shape.num_columns) + ", " + to_text(i % shape.num_columns) + "]";
    require(false, "assign", argument.c_str(), cost[i], "is neither finite nor +infinity");
  }
}

class Solver {
 public:
  Solver(const AssignmentShape& shape, const double* cost, std::vector<int64_t> capacity)
      : num_columns_(static_cast<size_t>(shape.num_columns)),
        cost_(cost),
        capacity_(std::move(capacity)),
        rows_of_(num_columns_),
        column_of_(static_cast<size_t>(shape.num_rows), kNone),
        place_of_(static_cast<size_t>(shape.num_rows), 0),
        row_dual_(static_cast<size_t>(shape.num_rows), 0.0),
        column_dual_(num_columns_, 0.0),
        distance_(num_columns_),
        from_row_(num_columns_),
        is_settled_(num_columns_) {}

  void solve() {
    for (size_t row = 0; row < column_of_.size(); ++row) add(row);
  }
  const std::vector<size_t>& column_of() const { return column_of_; }
  const std::vector<double>& row_dual() const { return row_dual_; }
  const std::vector<double>& column_dual() const { return column_dual_; }

 private:
  static constexpr size_t kNone = std::numeric_limits<size_t>::max();

  bool has_room(size_t column) const {
    return static_cast<int64_t>(rows_of_[column].size()) < capacity_[column];
  }

  /// Offers every column by a move of `row`, which costs `distance` to free.
  void relax(size_t row, double distance) {
    const double* const cost = cost_ + row * num_columns_;
    const double base = distance - row_dual_[row];
    for (size_t c = 0; c < num_columns_; ++c) {
      const double candidate = base + cost[c] - column_dual_[c];
      if (candidate < distance_[c] && !is_settled_[c]) {
        distance_[c] = candidate;
        from_row_[c] = row;
      }
    }
  }

  /// The nearest column that is not settled: with room before without, then by smaller number.
  size_t nearest() const {
    size_t best = kNone;
    for (size_t c = 0; c < num_columns_; ++c) {
      if (is_settled_[c] || distance_[c] == kInfinity) continue;
      if (best == kNone || distance_[c] < distance_[best] ||
          (distance_[c] == distance_[best] && has_room(c) && !has_room(best))) {
        best = c;
      }
    }
    return best;
  }

  void add(size_t row) {
    std::fill(distance_.begin(), distance_.end(), kInfinity);
    std::fill(is_settled_.begin(), is_settled_.end(), uint8_t{0});
    relax(row, 0);
    size_t column = nearest();
    while (column != kNone && !has_room(column)) {
      is_settled_[column] = 1;
      for (const size_t other : rows_of_[column]) relax(other, distance_[column]);
      column = nearest();
    }
    require(column != kNone, "assign", "cost", "+infinity",
            "in too many places: row " + to_text(row) + " and those before it do not fit");
    move_duals(row, distance_[column]);
    move_rows(row, column);
  }

  /// Keeps reduced costs from falling below 0 and those along the path at 0.
  void move_duals(size_t row, double shortest) {
    row_dual_[row] += shortest;
    for (size_t c = 0; c < num_columns_; ++c) {
      if (!is_settled_[c]) continue;
      const double slack = shortest - distance_[c];
      column_dual_[c] -= slack;
      for (const size_t other : rows_of_[c]) row_dual_[other] += slack;
    }
  }

  /// Each row on the path to `column` takes the place of the next one.
  void move_rows(size_t new_row, size_t column) {
    while (column != kNone) {
      const size_t row = from_row_[column];
      const size_t left = column_of_[row];
      if (left != kNone) {
        std::vector<size_t>& rows = rows_of_[left];
        rows[place_of_[row]] = rows.back();
        place_of_[rows.back()] = place_of_[row];
        rows.pop_back();
      }
      column_of_[row] = column;
      place_of_[row] = rows_of_[column].size();
      rows_of_[column].push_back(row);
      column = row == new_row ? kNone : left;
    }
  }

  size_t num_columns_;
  const double* cost_;
  std::vector<int64_t> capacity_;
  std::vector<std::vector<size_t>> rows_of_;
  std::vector<size_t> column_of_;  // of each row
  std::vector<size_t> place_of_;   // of each row among the rows of its column
  std::vector<double> row_dual_, column_dual_;
  // Of one search.
  std::vector<double> distance_;
  std::vector<size_t> from_row_;  // the row whose move reaches the column
  std::vector<uint8_t> is_settled_;
};

/// [R, C] costs: scores with the opposite sign, those that are not finite as the smallest one.
std::vector<double> costs_of(const AssignmentShape& shape, DType dtype, const void* scores) {
  return dispatch_float_dtype(dtype, "assign_balanced", [&](auto tag) {
    using T = decltype(tag);
    const T* const score = static_cast<const T*>(scores);
    const auto count = static_cast<size_t>(shape.num_rows * shape.num_columns);
    double smallest = kInfinity;
    for (size_t i = 0; i < count; ++i) {
      if (std::isfinite(score[i])) smallest = std::min(smallest, static_cast<double>(score[i]));
    }
    if (smallest == kInfinity) smallest = 0;
    std::vector<double> costs(count);
    for (size_t i = 0; i < count; ++i) {
      costs[i] = -(std::isfinite(score[i]) ? static_cast<double>(score[i]) : smallest);
    }
    return costs;
  });
}

void check_balanced(const AssignmentShape& shape, const void* scores,
                    const int32_t* column_of_row) {
  check("assign_balanced", shape, scores, column_of_row);
  require(shape.num_columns >= 1, "assign_balanced", "num_columns", shape.num_columns,
          "is below 1");
}

/// The same problem where C does not divide R. Columns c with room for R / C rows, rounded down,
/// and C + c with room for one more; C - R % C rows below the real ones occupy one of the latter
/// each.
struct PaddedProblem {
  AssignmentShape shape;
  std::vector<double> costs;
  std::vector<int64_t> capacity;
};

PaddedProblem padded(const AssignmentShape& shape, const std::vector<double>& costs) {
  const int64_t R = shape.num_rows, C = shape.num_columns;
  PaddedProblem result;
  result.shape = {R + C - R % C, 2 * C};
  result.capacity.assign(static_cast<size_t>(2 * C), 1);
  std::fill_n(result.capacity.begin(), C, R / C);
  result.costs.assign(static_cast<size_t>(result.shape.num_rows * 2 * C), 0.0);
  for (int64_t r = 0; r < result.shape.num_rows; ++r) {
    const auto row = result.costs.begin() + r * 2 * C;
    if (r < R) {
      std::copy_n(costs.begin() + r * C, C, row);
      std::copy_n(costs.begin() + r * C, C, row + C);
    } else {
      std::fill_n(row, C, kInfinity);
    }
  }
  return result;
}

/// Calls body(columns, cost) for every way to give R rows columns, in lexicographic order.
template <typename Body>
void for_each_way(const AssignmentShape& shape, const double* cost, const Body& body) {
  const auto R = static_cast<size_t>(shape.num_rows);
  std::vector<int32_t> columns(R, 0);
  if (shape.num_columns == 0 && R > 0) return;
  for (bool is_last = false; !is_last;) {
    double sum = 0;
    for (size_t r = 0; r < R; ++r) {
      sum += cost[static_cast<int64_t>(r) * shape.num_columns + columns[r]];
    }
    body(columns, sum);
    is_last = true;
    for (size_t r = R; r-- > 0 && is_last;) {
      is_last = ++columns[r] == shape.num_columns;
      if (is_last) columns[r] = 0;
    }
  }
}

}  // namespace

void assign(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
            int32_t* column_of_row, const AssignmentDuals& duals, Stream stream) {
  check("assign", shape, cost, column_of_row);
  if (stream.device == Device::kCuda) {
    return cuda::assign(shape, cost, capacity, column_of_row, duals, stream);
  }
  check_costs(shape, cost);
  Solver solver(shape, cost, checked_capacities(shape, capacity));
  solver.solve();
  std::transform(solver.column_of().begin(), solver.column_of().end(), column_of_row,
                 [](size_t column) { return static_cast<int32_t>(column); });
  if (duals.row != nullptr)
    std::copy(solver.row_dual().begin(), solver.row_dual().end(), duals.row);
  if (duals.column != nullptr) {
    std::copy(solver.column_dual().begin(), solver.column_dual().end(), duals.column);
  }
}

void assign_reference(const AssignmentShape& shape, const double* cost, const int64_t* capacity,
                      int32_t* column_of_row) {
  check("assign", shape, cost, column_of_row);
  check_costs(shape, cost);
  const std::vector<int64_t> room = checked_capacities(shape, capacity);
  double least = kInfinity;
  for_each_way(shape, cost, [&](const std::vector<int32_t>& columns, double sum) {
    std::vector<int64_t> left = room;
    for (const int32_t c : columns) --left[static_cast<size_t>(c)];
    const bool fits = std::all_of(left.begin(), left.end(), [](int64_t n) { return n >= 0; });
    if (!fits || sum >= least) return;
    least = sum;
    std::copy(columns.begin(), columns.end(), column_of_row);
  });
  require(least < kInfinity || shape.num_rows == 0, "assign", "cost", "+infinity",
          "in too many places: the rows do not fit");
}

void assign_balanced(const AssignmentShape& shape, DType dtype, const void* scores,
                     int32_t* column_of_row, Stream stream) {
  check_balanced(shape, scores, column_of_row);
  if (stream.device == Device::kCuda) {
    return cuda::assign_balanced(shape, dtype, scores, column_of_row, stream);
  }
  const int64_t R = shape.num_rows, C = shape.num_columns;
  const std::vector<double> costs = costs_of(shape, dtype, scores);
  if (R % C == 0) {
    const std::vector<int64_t> capacity(static_cast<size_t>(C), R / C);
    assign(shape, costs.data(), capacity.data(), column_of_row);
    return;
  }
  const PaddedProblem problem = padded(shape, costs);
  std::vector<int32_t> columns(static_cast<size_t>(problem.shape.num_rows));
  assign(problem.shape, problem.costs.data(), problem.capacity.data(), columns.data());
  std::transform(columns.begin(), columns.begin() + R, column_of_row,
                 [&](int32_t column) { return static_cast<int32_t>(column % C); });
}

void assign_balanced_reference(const AssignmentShape& shape, DType dtype, const void* scores,
                               int32_t* column_of_row) {
  check_balanced(shape, scores, column_of_row);
  const int64_t R = shape.num_rows, C = shape.num_columns;
  const std::vector<double> costs = costs_of(shape, dtype, scores);
  double least = kInfinity;
  for_each_way(shape, costs.data(), [&](const std::vector<int32_t>& columns, double sum) {
    std::vector<int64_t> loads(static_cast<size_t>(C), 0);
    for (const int32_t c : columns) ++loads[static_cast<size_t>(c)];
    const bool is_balanced = std::all_of(loads.begin(), loads.end(), [&](int64_t load) {
      return load >= R / C && load <= ceil_div(R, C);
    });
    if (!is_balanced || sum >= least) return;
    least = sum;
    std::copy(columns.begin(), columns.end(), column_of_row);
  });
}

}  // namespace perseid::kernels
