#pragma once
#include <string>
#include <vector>

#include "examples/common/json_lines.h"
#include "examples/train_fashion/train.h"

// What both tasks say about the search over orders. All of it is empty for runs without one.

namespace perseid::examples {

/// For the table at the start of a run.
std::string search_text(const TrainOptions& options, const std::vector<GateKind>& gates);

/// The end of a step line: " | 2 searches, 52 evaluations, 1 move, held 0.5312 -> 0.5301 | moved
/// 2".
std::string search_part(const SearchResult& search);

/// Lines below those of the test, each after a line break: the searches, then each repair.
std::string search_lines(const SearchResult& search);

/// Columns of the final table. Cells are means over the runs; empty for runs without search.
void add_search_header(std::vector<std::string>& header);
void add_search_cells(const std::vector<SearchResult>& runs, std::vector<std::string>& row);

void add_search(JsonObject& object, const TrainOptions& options, const SearchResult& search);

}  // namespace perseid::examples
