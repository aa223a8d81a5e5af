#pragma once
#include "kernels/doubly_stochastic.h"

// Argument checks of doubly_stochastic and its reference; throw ConfigError. Private to this
// folder.

namespace perseid::kernels {

/// Of |score / temperature|; above it, as for NaN, the matrix has no result.
inline constexpr double kQuotientMax = 1e12;

void check_doubly_stochastic(const char* operation, const DoublyStochasticShape& shape,
                             const DoublyStochasticOptions& options, const void* scores);
/// A buffer of [B, n, n].
void require_matrices(const char* operation, const char* argument,
                      const DoublyStochasticShape& shape, const void* buffer);

}  // namespace perseid::kernels
