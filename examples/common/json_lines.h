#pragma once
#include <cstdint>
#include <fstream>
#include <string>
#include <variant>
#include <vector>

namespace perseid::examples {

/// One member of a JSON object. Numbers are written so that reading gives the same bits.
struct JsonField {
  std::string name;
  std::variant<std::string, int64_t, double, std::vector<double>, std::vector<int64_t>,
               std::vector<std::string>>
      value;
};
using JsonObject = std::vector<JsonField>;

/// {"name": value, ...} in the order of the fields; NaN and infinities become null.
std::string to_json(const JsonObject& object);

/// A file with one JSON object per line. An empty path writes nothing.
class JsonLines {
 public:
  /// Makes the file empty. Throws IoError if it cannot be written.
  explicit JsonLines(const std::string& path);
  /// Appends a line and flushes it. Throws IoError, for example if the disk is full.
  void write(const JsonObject& object);

 private:
  std::string path_;
  std::ofstream file_;
};

}  // namespace perseid::examples
