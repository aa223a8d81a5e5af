#include "examples/train_fashion/search_report.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>

#include "examples/common/text.h"
#include "examples/train_fashion/report.h"

namespace perseid::examples {
namespace {

using gates::PermScope;
using gates::PermSearch;

const char* search_name(PermSearch search) {
  switch (search) {
    case PermSearch::kNone:
      return "none";
    case PermSearch::kSinkhorn:
      return "sinkhorn";
    case PermSearch::kSwap:
      return "swap";
  }
  return "?";
}

const char* scope_name(PermScope scope) {
  switch (scope) {
    case PermScope::kShared:
      return "shared";
    case PermScope::kPerGate:
      return "per_gate";
    case PermScope::kPerTree:
      return "per_tree";
  }
  return "?";
}

std::string counted(int64_t count, const char* noun) {
  return format_text("%lld %s%s", static_cast<long long>(count), noun, count == 1 ? "" : "s");
}

/// "2 searches, 52 evaluations, 1 move, held 0.5312 -> 0.5301"
std::string searches_text(const SearchResult& search) {
  return format_text("%lld search%s, ", static_cast<long long>(search.searches),
                     search.searches == 1 ? "" : "es") +
         counted(search.evaluations, "evaluation") + ", " + counted(search.moves, "move") +
         format_text(", held %.4f -> %.4f", search.loss_before, search.loss_after);
}

/// "2", of several orders "2+0".
std::string changed_text(const SearchResult& search) {
  std::string text;
  for (const int64_t changed : search.changed) {
    if (!text.empty()) text += '+';
    text += std::to_string(changed);
  }
  return text;
}

double sum(const std::vector<int64_t>& values) {
  return static_cast<double>(std::accumulate(values.begin(), values.end(), int64_t{0}));
}

struct Column {
  const char* name;
  const char* format;
  double (*value)(const SearchResult& search);
};
using Result = const SearchResult&;
constexpr std::array<Column, 6> kColumns = {{
    {"searches", "%.0f", [](Result s) { return static_cast<double>(s.searches); }},
    {"evaluations", "%.1f", [](Result s) { return static_cast<double>(s.evaluations); }},
    {"moves", "%.1f", [](Result s) { return static_cast<double>(s.moves); }},
    {"held before", "%.4f", [](Result s) { return s.loss_before; }},
    {"held after", "%.4f", [](Result s) { return s.loss_after; }},
    {"moved", "%.1f", [](Result s) { return sum(s.changed); }},
}};

int64_t num_recovered(const SearchResult& search) {
  return std::count_if(search.repairs.begin(), search.repairs.end(),
                       [](const RepairTrial& trial) { return trial.is_recovered; });
}

std::string repair_lines(const SearchResult& search) {
  std::string lines;
  int64_t number = 0;
  int64_t all = 0;
  int64_t most = 0;
  for (const RepairTrial& trial : search.repairs) {
    lines += format_text("\nscramble %3lld | held %.6f -> %.6f | ",
                         static_cast<long long>(++number), trial.scrambled_loss, trial.loss) +
             counted(trial.evaluations, "evaluation") +
             (trial.is_recovered ? " | recovered" : " | not recovered");
    all += trial.evaluations;
    most = std::max(most, trial.evaluations);
  }
  return lines + format_text(
                     "\nrecovered %lld of %lld, evaluations mean %.1f and max %lld; held loss "
                     "of the trained order %.6f",
                     static_cast<long long>(num_recovered(search)), static_cast<long long>(number),
                     static_cast<double>(all) / static_cast<double>(number),
                     static_cast<long long>(most), search.trained_loss);
}

}  // namespace

std::string search_text(const TrainOptions& options, const std::vector<GateKind>& gates) {
  const SearchOptions& search = options.search;
  const PermSearch kind = search.permutation.search();
  if (kind == PermSearch::kNone) return "";
  std::string text =
      format_text("%s, %s, in the first %g of the run", search_name(kind),
                  scope_name(search.permutation.scope()), search.permutation.until());
  if (kind == PermSearch::kSwap) {
    text += search.interval > 0
                ? format_text(", every %lld steps", static_cast<long long>(search.interval))
                : std::string(", every epoch");
  }
  if (kind == PermSearch::kSwap || search.scramble > 0) {
    text += format_text("; at most %lld evaluations on %lld held batches",
                        static_cast<long long>(search.max_evaluations),
                        static_cast<long long>(search.held_batches));
  }
  if (std::find(gates.begin(), gates.end(), GateKind::kSingle) != gates.end()) {
    text += "; single has none";
  }
  return text;
}

std::string search_part(const SearchResult& search) {
  if (!search.is_used()) return "";
  return (search.searches > 0 ? " | " + searches_text(search) : std::string()) + " | moved " +
         changed_text(search);
}

std::string search_lines(const SearchResult& search) {
  if (!search.is_used()) return "";
  std::string lines = "\norder | ";
  if (search.searches > 0) {
    lines += searches_text(search) + format_text(", %.2f s | ", search.seconds);
  }
  size_t places = 0;
  for (const auto& map : search.maps) places += map.size();
  lines += "moved " + changed_text(search) + format_text(" of %zu", places);
  return search.repairs.empty() ? lines : lines + repair_lines(search);
}

void add_search_header(std::vector<std::string>& header) {
  for (const Column& column : kColumns) header.emplace_back(column.name);
}

void add_search_cells(const std::vector<SearchResult>& runs, std::vector<std::string>& row) {
  for (const Column& column : kColumns) {
    std::vector<double> values;
    for (const SearchResult& run : runs) {
      if (run.is_used()) values.push_back(column.value(run));
    }
    row.push_back(values.empty() ? "" : mean_text(values, column.format));
  }
}

void add_search(JsonObject& object, const TrainOptions& options, const SearchResult& search) {
  if (!search.is_used()) return;
  const gates::PermutationOptions& permutation = options.search.permutation;
  std::vector<int64_t> map;
  for (const auto& one : search.maps) map.insert(map.end(), one.begin(), one.end());
  for (const JsonField& field :
       JsonObject{{"perm_search", std::string(search_name(permutation.search()))},
                  {"perm_scope", std::string(scope_name(permutation.scope()))},
                  {"perm_until", permutation.until()},
                  {"perm_searches", search.searches},
                  {"perm_evaluations", search.evaluations},
                  {"perm_moves", search.moves},
                  {"perm_held_loss_before", search.loss_before},
                  {"perm_held_loss_after", search.loss_after},
                  {"perm_seconds", search.seconds},
                  {"perm_changed", search.changed},
                  {"perm_map", map}}) {
    object.push_back(field);
  }
  if (search.repairs.empty()) return;
  std::vector<double> scrambled, repaired;
  std::vector<int64_t> evaluations, recovered;
  for (const RepairTrial& trial : search.repairs) {
    scrambled.push_back(trial.scrambled_loss);
    repaired.push_back(trial.loss);
    evaluations.push_back(trial.evaluations);
    recovered.push_back(trial.is_recovered ? 1 : 0);
  }
  object.push_back({"repair_trained_loss", search.trained_loss});
  object.push_back({"repair_scrambled_loss", scrambled});
  object.push_back({"repair_loss", repaired});
  object.push_back({"repair_evaluations", evaluations});
  object.push_back({"repair_recovered", recovered});
  object.push_back({"repair_num_recovered", num_recovered(search)});
}

}  // namespace perseid::examples
