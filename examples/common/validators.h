#pragma once
#include <CLI/CLI.hpp>
#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

// Checks of flag values. Help shows the limits, and an error names value and limits.

namespace perseid::examples {

/// A number in [low, high].
template <typename T>
CLI::Validator in_range(T low, T high) {
  const auto shown = [](T value) {
    std::ostringstream text;
    text << value;
    return text.str();
  };
  const std::string limits = shown(low) + " to " + shown(high);
  return CLI::Validator(
      [low, high, limits](std::string& text) {
        T value{};
        const bool is_number = CLI::detail::lexical_cast(text, value);
        if (is_number && value >= low && value <= high) return std::string();
        return "value " + text + " is out of range; choose " + limits;
      },
      limits);
}

inline CLI::Validator one_of(const std::vector<std::string>& words) {
  std::string list;
  for (const std::string& word : words) list += (list.empty() ? "" : ",") + word;
  return CLI::Validator(
      [words, list](std::string& text) {
        if (std::find(words.begin(), words.end(), text) != words.end()) return std::string();
        return "value " + text + " is not one of {" + list + "}";
      },
      "{" + list + "}");
}

}  // namespace perseid::examples
