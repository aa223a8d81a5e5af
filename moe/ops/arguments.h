#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/error.h"

// Internal: arguments of a registered operation.

namespace perseid::ops {

/// The arguments of a call by the names of its schema. Borrows both.
class Arguments {
 public:
  Arguments(const c10::FunctionSchema& schema, at::ArrayRef<c10::IValue> values)
      : schema_(schema), values_(values) {}

  const c10::IValue& operator[](std::string_view name) const;
  bool has(std::string_view name) const { return !(*this)[name].isNone(); }
  at::Tensor tensor(std::string_view name) const;  ///< undefined for None
  int64_t integer(std::string_view name) const { return (*this)[name].toInt(); }
  double real(std::string_view name) const { return (*this)[name].toDouble(); }
  bool flag(std::string_view name) const { return (*this)[name].toBool(); }
  const std::string& text(std::string_view name) const { return (*this)[name].toStringRef(); }

 private:
  const c10::FunctionSchema& schema_;
  at::ArrayRef<c10::IValue> values_;
};

/// Throws ConfigError for a word that is none of `choices`.
template <typename T>
T choice(const char* operation, const char* argument, const std::string& word,
         const std::vector<std::pair<const char*, T>>& choices) {
  std::string words;
  for (const auto& [name, value] : choices) {
    if (word == name) return value;
    words += (words.empty() ? "" : ", ") + std::string(name);
  }
  require(false, operation, argument, word, "is none of " + words);
  return choices.front().second;  // not reached
}

/// Throws ConfigError unless the tensor, if defined, has these sizes and is floating.
void require_sizes(const char* operation, const char* argument, const at::Tensor& tensor,
                   at::IntArrayRef sizes);

}  // namespace perseid::ops
