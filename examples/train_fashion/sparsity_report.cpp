#include "examples/train_fashion/sparsity_report.h"

#include "examples/common/text.h"
#include "examples/train_fashion/report.h"

namespace perseid::examples {

const char* sparse_method_name(SparseMethod method) {
  switch (method) {
    case SparseMethod::kNone:
      return "none";
    case SparseMethod::kStatic:
      return "static";
    case SparseMethod::kSet:
      return "set";
    case SparseMethod::kRigl:
      return "rigl";
    case SparseMethod::kNmDst:
      return "nm_dst";
    case SparseMethod::kSrSte:
      return "srste";
    case SparseMethod::kMdGfLin:
      return "mdgf_lin";
    case SparseMethod::kMdGfExp:
      return "mdgf_exp";
    case SparseMethod::kSdGfStep:
      return "sdgf_step";
    case SparseMethod::kSdGfGeo:
      return "sdgf_geo";
  }
  return "?";
}

std::string n_of_m_text(const SparsityOptions& sparsity) {
  if (!keeps_n_of_m(sparsity.method)) return "";
  return format_text("%lld:%lld", static_cast<long long>(sparsity.n_of_m.n),
                     static_cast<long long>(sparsity.n_of_m.m));
}

std::string sparsity_text(const TrainOptions& options) {
  const SparsityOptions& sparsity = options.sparsity;
  if (sparsity.method == SparseMethod::kNone) return "";
  const char* const name = sparse_method_name(sparsity.method);
  const std::string text =
      keeps_n_of_m(sparsity.method)
          ? format_text("%s, %s weights", name, n_of_m_text(sparsity).c_str())
          : format_text("%s, %g of the weights are 0", name, sparsity.sparsity);
  if (!moves_masks(sparsity.method)) return text;
  return text + format_text("; %g of the others move every %lld steps", sparsity.alpha,
                            static_cast<long long>(sparsity.every));
}

std::string sparsity_line(const SparsityResult& sparsity) {
  if (!sparsity.is_used()) return "";
  return format_text(
      "\nsparse | density %.4f | %lld updates, %lld skipped | churn %.3f | ever active %.2f",
      sparsity.density(), static_cast<long long>(sparsity.num_updates),
      static_cast<long long>(sparsity.num_skipped), sparsity.churn, sparsity.itop_rate);
}

void add_sparsity_header(std::vector<std::string>& header) {
  header.insert(header.end(), {"density", "churn", "ITOP rate"});
}

void add_sparsity_cells(const std::vector<SparsityResult>& runs, std::vector<std::string>& row) {
  if (runs.empty()) {
    row.insert(row.end(), 3, "");
    return;
  }
  std::vector<double> density, churn, itop_rate;
  for (const SparsityResult& run : runs) {
    density.push_back(run.density());
    churn.push_back(run.churn);
    itop_rate.push_back(run.itop_rate);
  }
  row.push_back(mean_text(density, "%.4f"));
  row.push_back(mean_text(churn, "%.3f"));
  row.push_back(mean_text(itop_rate, "%.2f"));
}

void add_sparsity(JsonObject& object, const TrainOptions& options, const SparsityResult& sparsity) {
  if (!sparsity.is_used()) return;
  const SparsityOptions& asked = options.sparsity;
  for (const JsonField& field : JsonObject{{"dst", std::string(sparse_method_name(asked.method))},
                                           {"sparsity", asked.sparsity},
                                           {"dst_nm", n_of_m_text(asked)},
                                           {"dst_every", asked.every},
                                           {"dst_alpha", asked.alpha},
                                           {"density", sparsity.density()},
                                           {"nnz", sparsity.nnz},
                                           {"dst_updates", sparsity.num_updates},
                                           {"dst_skipped", sparsity.num_skipped},
                                           {"dst_churn", sparsity.churn},
                                           {"itop_rate", sparsity.itop_rate}}) {
    object.push_back(field);
  }
}

}  // namespace perseid::examples
