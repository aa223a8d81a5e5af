#pragma once
#include "kernels/statistical_top_k.h"

// Argument checks of statistical top-k and its reference; throw ConfigError. Private to this
// folder.

namespace perseid::kernels {

void check_statistical_top_k(const StatisticalTopKShape& shape,
                             const StatisticalTopKOptions& options, const void* scores,
                             const void* weights);
void check_statistical_top_k_backward(const StatisticalTopKShape& shape,
                                      const StatisticalTopKOptions& options, const void* scores,
                                      const void* weights, const void* grad_weights,
                                      const void* grad_scores);

}  // namespace perseid::kernels
