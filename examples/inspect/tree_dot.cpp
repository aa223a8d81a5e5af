#include "examples/inspect/tree_dot.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <span>

#include "examples/common/json_reader.h"
#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr int64_t kMaxExperts = 4096;
constexpr size_t kMaxDomains = 64;
constexpr size_t kMaxName = 64;  // bytes of a domain's name
constexpr std::array<const char*, 8> kColours = {"#4C78A8", "#F58518", "#54A24B", "#B279A2",
                                                 "#E45756", "#72B7B2", "#EECA3B", "#9D755D"};

const char* colour(size_t domain) { return kColours.at(domain % kColours.size()); }

/// Text inside a label of HTML form.
std::string escaped(const std::string& text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      default:
        result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return result;
}

/// The tables of a run by tree and node.
class Trees {
 public:
  explicit Trees(const TreeRun& run)
      : run_(run),
        num_splits_(static_cast<size_t>(run.num_experts - 1)),
        num_nodes_(2 * num_splits_ + 1) {}

  size_t num_splits() const { return num_splits_; }
  size_t num_nodes() const { return num_nodes_; }
  std::span<const int64_t> domains(size_t tree, size_t node) const {
    return std::span(run_.reached)
        .subspan((tree * num_nodes_ + node) * run_.domains.size(), run_.domains.size());
  }
  int64_t reached(size_t tree, size_t node) const {
    const auto counts = domains(tree, node);
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  }
  size_t largest_domain(size_t tree, size_t node) const {
    const auto counts = domains(tree, node);
    return static_cast<size_t>(std::max_element(counts.begin(), counts.end()) - counts.begin());
  }
  int64_t left(size_t tree, size_t split) const { return run_.left[tree * num_splits_ + split]; }
  int64_t right(size_t tree, size_t split) const { return run_.right[tree * num_splits_ + split]; }

 private:
  const TreeRun& run_;
  size_t num_splits_;
  size_t num_nodes_;
};

double share(int64_t part, int64_t all) {
  return all > 0 ? static_cast<double>(part) / static_cast<double>(all) : 0.0;
}

/// "41 %"; "<1 %" for what is there but rounds to 0.
std::string percent(int64_t part, int64_t all) {
  const double value = 100 * share(part, all);
  return part > 0 && value < .5 ? "&lt;1 %" : format_text("%.0f %%", value);
}

std::string split_label(const Trees& trees, size_t tree, size_t split) {
  const int64_t all = trees.reached(tree, split);
  if (all == 0) return "<no image>";
  const int64_t left = trees.left(tree, split);
  const int64_t right = trees.right(tree, split);
  return "<<table border=\"0\" cellspacing=\"3\" cellpadding=\"0\"><tr><td>← " +
         percent(left, all) + "&#160;&#160;&#160;" + percent(right, all) +
         " →</td></tr><tr><td>both " + percent(all - left - right, all) + "</td></tr></table>>";
}

/// Expert and load, a bar of the domains, and domains of 15 % or more in words.
std::string leaf_label(const TreeRun& run, const Trees& trees, size_t tree, size_t node,
                       int64_t expert, int64_t num_images) {
  constexpr double kBarWidth = 96;
  const auto counts = trees.domains(tree, node);
  const int64_t all = trees.reached(tree, node);
  std::string bar;
  std::string words;
  std::vector<size_t> order(counts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return counts[a] > counts[b]; });
  for (const size_t domain : order) {
    const int width = static_cast<int>(kBarWidth * share(counts[domain], all) + .5);
    if (width > 0) {
      bar += format_text("<td width=\"%d\" height=\"7\" fixedsize=\"true\" bgcolor=\"%s\"></td>",
                         width, colour(domain));
    }
    if (share(counts[domain], all) >= .15) {
      words += "<br/>" + escaped(run.domains[domain]) + " " + percent(counts[domain], all);
    }
  }
  if (!bar.empty()) {
    bar = "<tr><td><table border=\"0\" cellspacing=\"0\" cellpadding=\"0\"><tr>" + bar +
          "</tr></table></td></tr>";
  }
  return "<<table border=\"0\" cellspacing=\"0\" cellpadding=\"2\"><tr><td><b>expert " +
         std::to_string(expert) + "</b></td></tr><tr><td>" + percent(all, num_images) +
         " of images</td></tr>" + bar +
         (words.empty()
              ? ""
              : "<tr><td><font point-size=\"9\">" + words.substr(5) + "</font></td></tr>") +
         "</table>>";
}

std::string edge(const Trees& trees, size_t tree, size_t child, int64_t num_images) {
  const int64_t count = trees.reached(tree, child);
  const std::string ends =
      format_text("    t%zun%zu -> t%zun%zu ", tree, (child - 1) / 2, tree, child);
  if (count == 0) return ends + "[style=dotted, color=\"#BBBBBB\"];\n";
  return ends + format_text("[penwidth=%.1f, color=\"%s\"];\n", 1 + 9 * share(count, num_images),
                            colour(trees.largest_domain(tree, child)));
}

/// Title of the drawing, and the colours of the domains.
std::string title(const TreeRun& run, int64_t num_images) {
  std::string legend;
  for (size_t domain = 0; domain < run.domains.size(); ++domain) {
    legend +=
        format_text("<td width=\"14\" height=\"10\" fixedsize=\"true\" bgcolor=\"%s\"></td><td>",
                    colour(domain)) +
        escaped(run.domains[domain]) + "   </td>";
  }
  return format_text(
             "<<table border=\"0\" cellspacing=\"4\" cellpadding=\"0\">"
             "<tr><td><b>COMET, seed %lld</b>: %lld tree%s, %lld experts, %s test images"
             "</td></tr><tr><td><table border=\"0\" cellspacing=\"3\"><tr>",
             static_cast<long long>(run.seed), static_cast<long long>(run.num_trees),
             run.num_trees == 1 ? "" : "s", static_cast<long long>(run.num_experts),
             with_commas(num_images).c_str()) +
         legend + "</tr></table></td></tr></table>>";
}

void check(const TreeRun& run, const JsonFields& fields) {
  const Trees trees(run);
  for (size_t tree = 0; tree < static_cast<size_t>(run.num_trees); ++tree) {
    for (size_t node = 0; node < trees.num_nodes(); ++node) {
      for (size_t d = 0; node > 0 && d < run.domains.size(); ++d) {
        if (trees.domains(tree, node)[d] > trees.domains(tree, (node - 1) / 2)[d]) {
          fields.refuse("tree_reached", "has more images in a node than above it");
        }
      }
      if (node < trees.num_splits() &&
          trees.left(tree, node) > trees.reached(tree, node) - trees.right(tree, node)) {
        fields.refuse("tree_left", "and tree_right have more images than reach their node");
      }
    }
  }
}

/// Of each tree, from that of each tree or of all together.
std::vector<int64_t> expert_map(const TreeRun& run, const JsonFields& fields) {
  const auto num_trees = static_cast<size_t>(run.num_trees);
  const auto num_experts = static_cast<size_t>(run.num_experts);
  const size_t num_units = fields.text("perm_scope") == "per_tree" ? num_trees : 1;
  const std::vector<int64_t>& of_units =
      fields.counts("perm_map", num_units * num_experts, run.num_experts - 1);
  std::vector<int64_t> map;
  while (map.size() < num_trees * num_experts) {
    map.insert(map.end(), of_units.begin(), of_units.end());
  }
  return map;
}

TreeRun tree_run(const JsonObject& object, const std::string& place) {
  const JsonFields fields(object, place);
  TreeRun run;
  run.seed = fields.integer("seed", 0, INT64_MAX);
  run.num_experts = fields.integer("num_experts", 1, kMaxExperts);
  run.num_trees = fields.integer("top_k", 1, run.num_experts);
  run.domains = fields.texts("domains");
  if (run.domains.empty() || run.domains.size() > kMaxDomains) {
    fields.refuse("domains", "has not 1 to 64 names");
  }
  for (const std::string& domain : run.domains) {
    if (domain.size() > kMaxName) fields.refuse("domains", "has a name above 64 bytes");
  }
  const auto num_trees = static_cast<size_t>(run.num_trees);
  const auto num_splits = static_cast<size_t>(run.num_experts - 1);
  // Small numbers, so that no sum of them leaves int64_t.
  const int64_t limit = int64_t{1} << 50;
  run.reached =
      fields.counts("tree_reached", num_trees * (2 * num_splits + 1) * run.domains.size(), limit);
  run.left = fields.counts("tree_left", num_trees * num_splits, limit);
  run.right = fields.counts("tree_right", num_trees * num_splits, limit);
  check(run, fields);
  if (std::any_of(object.begin(), object.end(),
                  [](const JsonField& field) { return field.name == "perm_map"; })) {
    run.expert_map = expert_map(run, fields);
  }
  return run;
}

}  // namespace

TreeRun read_tree_run(const std::string& path, std::optional<int64_t> seed) {
  const std::vector<JsonObject> objects = read_json_lines(path);
  for (size_t i = 0; i < objects.size(); ++i) {
    const std::string place = path + ":" + std::to_string(i + 1);
    const JsonFields fields(objects[i], place);
    if (fields.text("gate") != "comet") continue;
    if (seed && fields.integer("seed", 0, INT64_MAX) != *seed) continue;
    return tree_run(objects[i], place);
  }
  throw DataError(ErrorDetail{
      "inspect", "file", path,
      (seed ? format_text("has no COMET run of seed %lld", static_cast<long long>(*seed))
            : std::string("has no COMET run")) +
          "; write one with: train_fashion --gate comet --json FILE"});
}

std::vector<int64_t> expert_of_nodes(int64_t num_experts) {
  const auto num_splits = static_cast<size_t>(num_experts - 1);
  std::vector<int64_t> leaves(2 * num_splits + 1, -1);
  std::vector<size_t> open{0};  // a stack: the left child on top
  int64_t leaf = 0;
  while (!open.empty()) {
    const size_t node = open.back();
    open.pop_back();
    if (node < num_splits) {
      open.push_back(2 * node + 2);
      open.push_back(2 * node + 1);
    } else {
      leaves[node] = leaf++;
    }
  }
  return leaves;
}

std::string tree_dot(const TreeRun& run) {
  const Trees trees(run);
  const std::vector<int64_t> leaves = expert_of_nodes(run.num_experts);
  const auto expert_of = [&](size_t tree, size_t node) {
    if (run.expert_map.empty()) return leaves[node];
    return run.expert_map[tree * static_cast<size_t>(run.num_experts) +
                          static_cast<size_t>(leaves[node])];
  };
  const int64_t num_images = trees.reached(0, 0);
  std::string dot =
      "digraph comet {\n"
      "  graph [fontname=\"Helvetica\", labelloc=\"t\", nodesep=0.15, ranksep=0.45, "
      "ordering=\"out\",\n         label=" +
      title(run, num_images) +
      "];\n"
      "  node [fontname=\"Helvetica\", fontsize=11];\n"
      "  edge [arrowhead=none];\n";
  for (size_t tree = 0; tree < static_cast<size_t>(run.num_trees); ++tree) {
    dot += format_text("  subgraph cluster_%zu {\n    label=\"tree %zu\"; color=\"#DDDDDD\";\n",
                       tree, tree);
    for (size_t node = 0; node < trees.num_nodes(); ++node) {
      const bool is_split = node < trees.num_splits();
      const bool is_reached = trees.reached(tree, node) > 0;
      const std::string frame = is_reached ? colour(trees.largest_domain(tree, node)) : "#BBBBBB";
      dot += format_text(
                 "    t%zun%zu [shape=box, style=\"%s\", margin=\"0.04\", color=\"%s\", "
                 "label=",
                 tree, node, is_split ? "rounded" : "solid", frame.c_str()) +
             (is_split ? split_label(trees, tree, node)
                       : leaf_label(run, trees, tree, node, expert_of(tree, node), num_images)) +
             "];\n";
    }
    for (size_t child = 1; child < trees.num_nodes(); ++child) {
      dot += edge(trees, tree, child, num_images);
    }
    dot += "  }\n";
  }
  return dot + "}\n";
}

}  // namespace perseid::examples
