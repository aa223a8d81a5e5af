#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "examples/common/json_lines.h"

namespace perseid::examples {

/// Where test images go in the trees of a COMET gate, as train_fashion counts them. Nodes are in
/// heap order: the children of q are 2q+1 and 2q+2, nodes from num_experts - 1 on are leaves.
struct TreeRun {
  int64_t seed = 0;
  int64_t num_experts = 1;  ///< E
  int64_t num_trees = 1;    ///< K
  std::vector<std::string> domains;
  std::vector<int64_t> reached;  ///< [K, 2E-1, domains] images that reach the node
  std::vector<int64_t> left;     ///< [K, E-1] of these, images that go left only
  std::vector<int64_t> right;    ///< [K, E-1] right only; the others take both ways
  /// [K, E] expert of each leaf, of runs that searched for another order; else empty: leaf l is
  /// expert l.
  std::vector<int64_t> expert_map;
};

/// The run of a COMET gate in the file of `train_fashion --json`: that of `seed`, or the first.
/// Throws IoError if the file cannot be read, DataError that names line and field if it has no such
/// run or the counts contradict each other.
TreeRun read_tree_run(const std::string& path, std::optional<int64_t> seed);

/// Expert of each node of a tree, -1 for split nodes: leaf l of a left-first walk is expert l.
std::vector<int64_t> expert_of_nodes(int64_t num_experts);

/// The trees as a graph of Graphviz: split nodes with the share of their images that goes left,
/// right and both ways, leaves with expert, load and domains; edges as wide as the images that take
/// them, coloured by the most frequent domain, dotted where none does.
std::string tree_dot(const TreeRun& run);

}  // namespace perseid::examples
