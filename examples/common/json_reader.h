#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "examples/common/json_lines.h"

namespace perseid::examples {

/// The object of one line, as to_json writes them: strings, numbers, null (NaN), and arrays of
/// numbers or of strings. An array of whole numbers is one of int64_t, an empty one as well; others
/// are of double. The text may be anybody's: throws DataError that names `place` for anything else,
/// such as a name twice, objects in objects, numbers out of range, bytes that are no UTF-8.
JsonObject parse_json(const std::string& text, const std::string& place);

/// The lines of a file of JsonLines, which may be anybody's. Throws IoError if it cannot be read,
/// DataError that names file and line if it is not such a file or larger than 16 MiB.
std::vector<JsonObject> read_json_lines(const std::string& path);

/// Reads fields by name and type; errors name the field and the place of the object.
class JsonFields {
 public:
  /// @param object  borrowed
  /// @param place   for example "runs.jsonl:3"
  JsonFields(const JsonObject& object, std::string place);
  // These throw DataError if the field is missing, of another type or outside its limits.
  const std::string& text(const std::string& name) const;
  const std::vector<std::string>& texts(const std::string& name) const;
  int64_t integer(const std::string& name, int64_t low, int64_t high) const;
  /// `size` whole numbers from 0 to `limit`.
  const std::vector<int64_t>& counts(const std::string& name, size_t size, int64_t limit) const;
  [[noreturn]] void refuse(const std::string& name, const std::string& what) const;

 private:
  template <typename T>
  const T& value(const std::string& name, const char* type) const;

  const JsonObject& object_;
  std::string place_;
};

}  // namespace perseid::examples
