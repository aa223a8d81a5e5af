// For assignment_scipy_test.py: reads matrices of costs, each as R, C and R*C numbers, and writes
// the least cost of each that assign finds.
#include <cstdio>
#include <iostream>
#include <vector>

#include "kernels/assignment.h"

int main() {
  int64_t R = 0, C = 0;
  while (std::cin >> R >> C) {
    std::vector<double> cost(static_cast<size_t>(R * C));
    for (double& value : cost) std::cin >> value;
    std::vector<int32_t> columns(static_cast<size_t>(R));
    perseid::kernels::assign({R, C}, cost.data(), nullptr, columns.data());
    double sum = 0;
    std::vector<bool> is_taken(static_cast<size_t>(C));
    for (size_t r = 0; r < columns.size(); ++r) {
      const auto c = static_cast<size_t>(columns[r]);
      if (is_taken.at(c)) return 1;
      is_taken[c] = true;
      sum += cost[r * static_cast<size_t>(C) + c];
    }
    std::printf("%.17g\n", sum);
  }
}
