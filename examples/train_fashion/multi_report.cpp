#include "examples/train_fashion/multi_report.h"

#include <algorithm>
#include <functional>

#include "examples/common/console.h"
#include "examples/common/text.h"
#include "examples/train_fashion/search_report.h"
#include "examples/train_fashion/sparsity_report.h"

namespace perseid::examples {
namespace {

constexpr std::array<const char*, kNumTasks> kTaskNames = {"top left", "bottom right"};

std::string samples_text(const ImagePairs& pairs) { return count_text(pairs.size()); }

/// A figure of one task of a run.
struct Column {
  const char* name;
  const char* format;
  std::function<double(const MultiResult&, size_t task)> value;
};
std::vector<Column> columns() {
  return {
      {"accuracy", "%.4f", [](const MultiResult& r, size_t t) { return r.test.tasks[t].accuracy; }},
      {"cross-entropy", "%.4f",
       [](const MultiResult& r, size_t t) { return r.test.tasks[t].cross_entropy; }},
      {"experts, training", "%.2f",
       [](const MultiResult& r, size_t t) { return r.best().train.tasks[t].experts_per_token; }},
      {"experts, test", "%.2f",
       [](const MultiResult& r, size_t t) { return r.test.tasks[t].experts_per_token; }},
      {"max_vio", "%.2f", [](const MultiResult& r, size_t t) { return r.test.tasks[t].max_vio; }}};
}
/// Figures that both tasks share.
std::vector<Column> shared_columns() {
  return {
      {"rows/sample", "%.2f", [](const MultiResult& r, size_t) { return r.test.rows_per_sample; }},
      {"s/epoch", "%.2f", [](const MultiResult& r, size_t) { return r.seconds_per_epoch; }}};
}

std::vector<double> of_tasks(const MultiScore& score,
                             const std::function<double(const TaskScore&)>& value) {
  std::vector<double> values;
  for (const TaskScore& task : score.tasks) values.push_back(value(task));
  return values;
}

/// "validation_accuracy_top_left" and so on, one value for each epoch.
void add_curves(JsonObject& object, const std::string& prefix, const MultiResult& result,
                MultiScore EpochScore::*score) {
  struct Curve {
    const char* name;
    double TaskScore::*value;
  };
  for (const Curve& curve :
       {Curve{"accuracy", &TaskScore::accuracy}, Curve{"cross_entropy", &TaskScore::cross_entropy},
        Curve{"experts_per_token", &TaskScore::experts_per_token},
        Curve{"max_vio", &TaskScore::max_vio}}) {
    for (size_t task = 0; task < kNumTasks; ++task) {
      std::vector<double> values;
      for (const EpochScore& epoch : result.epochs) {
        values.push_back((epoch.*score).tasks[task].*(curve.value));
      }
      std::string name = kTaskNames[task];
      std::replace(name.begin(), name.end(), ' ', '_');
      object.push_back({prefix + "_" + curve.name + "_" + name, values});
    }
  }
  std::vector<double> rows;
  for (const EpochScore& epoch : result.epochs) rows.push_back((epoch.*score).rows_per_sample);
  object.push_back({prefix + "_rows_per_sample", rows});
}

}  // namespace

TaskFacts facts_of(const MultiData& data, const ProgramOptions& options) {
  const ExpertKind experts = options.experts;
  return {
      std::string("multi  (two images on a canvas, shared experts, ") +
          (experts == ExpertKind::kMlp ? "MLP 1296 -> 64 -> 50)" : "2 convolutions -> 50 -> 50)"),
      samples_text(data.train) + " training, " + samples_text(data.validation) + " validation, " +
          samples_text(data.test) + " test",
      data.train.size(), [experts](const TrainOptions& train) {
        return count_parameters({train, experts});
      }};
}

std::string epoch_line(const EpochScore& epoch) {
  const auto& tasks = epoch.validation.tasks;
  return format_text(
      "epoch %lld | validation accuracy %.4f %.4f | loss %.4f %.4f | experts/token %.2f %.2f"
      " | rows/sample %.2f",
      static_cast<long long>(epoch.epoch), tasks[0].accuracy, tasks[1].accuracy,
      tasks[0].cross_entropy, tasks[1].cross_entropy, tasks[0].experts_per_token,
      tasks[1].experts_per_token, epoch.validation.rows_per_sample);
}

std::string result_line(const FinishedMulti& run) {
  const MultiResult& result = run.result;
  std::string lines;
  for (size_t task = 0; task < kNumTasks; ++task) {
    const TaskScore& score = result.test.tasks[task];
    lines += format_text(
        "%stest %s seed %llu, epoch %lld, %s | accuracy %.4f | loss %.4f | experts/token %.2f | "
        "maxvio %.2f\nload %s",
        lines.empty() ? "" : "\n", gate_name(run.gate), static_cast<unsigned long long>(run.seed),
        static_cast<long long>(result.best_epoch), kTaskNames[task], score.accuracy,
        score.cross_entropy, score.experts_per_token, score.max_vio,
        load_bars(score.tokens_per_expert).c_str());
  }
  return lines + sparsity_line(result.sparsity) + search_lines(result.search);
}

std::string final_table(const std::vector<FinishedMulti>& runs) {
  std::vector<std::string> header{"gate", "task"};
  for (const Column& column : columns()) header.emplace_back(column.name);
  for (const Column& column : shared_columns()) header.emplace_back(column.name);
  const bool has_search = std::any_of(runs.begin(), runs.end(), [](const FinishedMulti& run) {
    return run.result.search.is_used();
  });
  const bool is_sparse = std::any_of(runs.begin(), runs.end(), [](const FinishedMulti& run) {
    return run.result.sparsity.is_used();
  });
  if (is_sparse) add_sparsity_header(header);
  if (has_search) add_search_header(header);
  std::vector<std::vector<std::string>> rows;
  for (auto first = runs.begin(); first != runs.end();) {
    const auto last = std::find_if(
        first, runs.end(), [&](const FinishedMulti& run) { return run.gate != first->gate; });
    for (size_t task = 0; task < kNumTasks; ++task) {
      const auto text = [&](const Column& column) {
        std::vector<double> values;
        std::for_each(first, last, [&](const FinishedMulti& run) {
          values.push_back(column.value(run.result, task));
        });
        return mean_text(values, column.format);
      };
      rows.push_back({task == 0 ? gate_name(first->gate) : "", kTaskNames[task]});
      for (const Column& column : columns()) rows.back().push_back(text(column));
      for (const Column& column : shared_columns()) {
        rows.back().push_back(task == 0 ? text(column) : "");
      }
      std::vector<SparsityResult> sparsities;  // of both tasks together
      std::vector<SearchResult> searches;
      if (task == 0) {
        std::for_each(first, last, [&](const FinishedMulti& run) {
          sparsities.push_back(run.result.sparsity);
          searches.push_back(run.result.search);
        });
      }
      if (is_sparse) add_sparsity_cells(sparsities, rows.back());
      if (!has_search) continue;
      add_search_cells(searches, rows.back());
    }
    first = last;
  }
  return results_table(header, rows);
}

JsonObject result_json(const FinishedMulti& run, const MultiOptions& options, int num_ranks) {
  const MultiResult& result = run.result;
  const TrainOptions& train = options.train;
  JsonObject object{
      {"task", std::string("multi")},
      {"gate", std::string(gate_name(run.gate))},
      {"seed", static_cast<int64_t>(run.seed)},
      {"ranks", int64_t{num_ranks}},
      {"experts", std::string(options.experts == ExpertKind::kMlp ? "mlp" : "conv")},
      {"num_experts", train.num_experts},
      {"top_k", train.top_k},
      {"aux_loss_coeff", train.aux_loss_coeff},
      {"balance_coeff", train.balance_coeff},
      {"gamma", train.gamma},
      {"entropy_coeff", train.entropy_coeff},
      {"entropy_ramp", train.entropy_ramp},
      {"input_norm", std::string(train.input_norm ? "layer_norm" : "none")},
      {"lr", train.lr},
      {"gate_lr_factor", train.gate_lr_factor},
      {"lr_decay", train.lr_decay},
      {"steps", result.num_steps},
      {"best_epoch", result.best_epoch},
      {"accuracy", of_tasks(result.test, [](const TaskScore& t) { return t.accuracy; })},
      {"cross_entropy", of_tasks(result.test, [](const TaskScore& t) { return t.cross_entropy; })},
      {"experts_per_token",
       of_tasks(result.test, [](const TaskScore& t) { return t.experts_per_token; })},
      {"max_vio", of_tasks(result.test, [](const TaskScore& t) { return t.max_vio; })},
      {"rows_per_sample", result.test.rows_per_sample},
      {"tokens_per_expert_top_left", result.test.tasks[0].tokens_per_expert},
      {"tokens_per_expert_bottom_right", result.test.tasks[1].tokens_per_expert},
      {"seconds_per_epoch", result.seconds_per_epoch}};
  add_sparsity(object, train, result.sparsity);
  add_search(object, train, result.search);
  add_curves(object, "train", result, &EpochScore::train);
  add_curves(object, "validation", result, &EpochScore::validation);
  return object;
}

}  // namespace perseid::examples
