#include "gates/losses.h"

#include <ATen/ops/dot.h>

#include "kernels/error.h"

namespace perseid::gates {

NamedLoss load_balance_loss(const BalanceTerms& terms, const at::Tensor& global_tokens_per_expert,
                            int64_t tokens_global) {
  constexpr const char* kOperation = "load_balance_loss";
  require(terms.score_sum.defined() && terms.score_sum.dim() == 1, kOperation, "score_sum",
          terms.score_sum.defined() ? to_text(terms.score_sum.sizes()) : "undefined",
          "is not [num_experts]; call it for gates that fill their balance terms");
  require(global_tokens_per_expert.sizes() == terms.score_sum.sizes(), kOperation,
          "global_tokens_per_expert", global_tokens_per_expert.sizes(),
          "differs from score_sum=" + to_text(terms.score_sum.sizes()) +
              "; sum the tokens_per_expert of the same gate over ranks");
  require(tokens_global >= 0, kOperation, "tokens_global", tokens_global, "is negative");
  require(terms.top_k >= 1, kOperation, "top_k", terms.top_k, "is below 1");

  // f and the sum in double, so that perfect balance gives the coefficient and not one near it.
  double scale = 0;
  if (tokens_global > 0) {
    const double assignments = static_cast<double>(tokens_global) *
                               (terms.normalize_by_k ? static_cast<double>(terms.top_k) : 1.0);
    scale = static_cast<double>(terms.score_sum.size(0)) / assignments /
            static_cast<double>(tokens_global);
  }
  const at::Tensor f = global_tokens_per_expert.to(at::kDouble).mul_(scale);
  const at::Tensor raw = at::dot(terms.score_sum.to(at::kDouble), f);
  const at::ScalarType type = terms.score_sum.scalar_type();
  return {"aux_loss", raw.mul(terms.aux_loss_coeff).to(type), raw.detach().to(type)};
}

NamedLoss z_loss(const at::Tensor& lse_square_sum, double coeff, int64_t tokens_global) {
  require(lse_square_sum.defined() && lse_square_sum.numel() == 1, "z_loss", "lse_square_sum",
          lse_square_sum.defined() ? to_text(lse_square_sum.sizes()) : "undefined",
          "is not a scalar");
  require(tokens_global >= 0, "z_loss", "tokens_global", tokens_global, "is negative");
  const double scale = tokens_global > 0 ? 1.0 / static_cast<double>(tokens_global) : 0.0;
  return {"z_loss", lse_square_sum.mul(coeff * scale), lse_square_sum.detach().mul(scale)};
}

}  // namespace perseid::gates
