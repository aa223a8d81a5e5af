#include "examples/common/text.h"

#include <cstdarg>
#include <cstdio>

namespace perseid::examples {

std::string format_text(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::va_list again;
  va_copy(again, arguments);
  const int size = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string text(static_cast<size_t>(size > 0 ? size : 0), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return text;
}

std::string with_commas(long long count) {
  const std::string digits = std::to_string(count);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    const bool follows_digit = i > 0 && digits[i - 1] != '-';
    if (follows_digit && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string short_count(double count) {
  if (count >= 1e6) return format_text("%.2fM", count / 1e6);
  if (count >= 1e3) return format_text("%.1fk", count / 1e3);
  return format_text("%.0f", count);
}

std::string cut_text(const std::string& text, int columns) {
  int seen = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool starts_character = (static_cast<unsigned char>(text[i]) & 0xC0u) != 0x80u;
    if (starts_character && seen++ == columns) return text.substr(0, i);
  }
  return text;
}

int text_columns(const std::string& text) {
  int seen = 0;
  for (const char c : text) seen += (static_cast<unsigned char>(c) & 0xC0u) != 0x80u;
  return seen;
}

}  // namespace perseid::examples
