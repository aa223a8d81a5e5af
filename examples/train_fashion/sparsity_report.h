#pragma once
#include <string>
#include <vector>

#include "examples/common/json_lines.h"
#include "examples/train_fashion/train.h"

// What both tasks say about sparse experts. All of it is empty for runs without.

namespace perseid::examples {

const char* sparse_method_name(SparseMethod method);
std::string n_of_m_text(const SparsityOptions& sparsity);  ///< "1:8"; empty for other methods

/// For the table at the start of a run.
std::string sparsity_text(const TrainOptions& options);

/// The line below the test: "\nsparse | density 0.1000 | 80 updates, 8 skipped | churn 0.210 | ever
/// active 0.46".
std::string sparsity_line(const SparsityResult& sparsity);

/// Columns of the final table: density, churn, ITOP rate. Cells are means over the runs; empty
/// without any.
void add_sparsity_header(std::vector<std::string>& header);
void add_sparsity_cells(const std::vector<SparsityResult>& runs, std::vector<std::string>& row);

void add_sparsity(JsonObject& object, const TrainOptions& options, const SparsityResult& sparsity);

}  // namespace perseid::examples
