#pragma once
#include <string>

namespace perseid::examples {

/// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format_text(const char* format, ...);

/// 62800 -> "62,800".
std::string with_commas(long long count);

/// 1590000 -> "1.59M", 41200 -> "41.2k", 870 -> "870".
std::string short_count(double count);

/// First `columns` characters of a UTF-8 text.
std::string cut_text(const std::string& text, int columns);
/// Characters of a UTF-8 text, taking each as one column.
int text_columns(const std::string& text);

}  // namespace perseid::examples
