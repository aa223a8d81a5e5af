#pragma once
#include <string>
#include <vector>

#include "examples/common/json_lines.h"
#include "examples/sparse_mlp/train.h"

namespace perseid::examples {

/// One line per run.
std::string mlp_table(const std::vector<MlpResult>& results);

/// What a random search of static masks found, and what it cost.
std::string random_search_text(const std::vector<MlpResult>& runs);

/// For study.py: settings, figures, and arrays over epochs and updates; those of masks have one
/// value for each update and layer, layer by layer inside an update.
JsonObject mlp_json(const MlpResult& result, int64_t epochs, int64_t train_images);

}  // namespace perseid::examples
