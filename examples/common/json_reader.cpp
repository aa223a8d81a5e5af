#include "examples/common/json_reader.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "examples/common/text.h"
#include "kernels/error.h"

namespace perseid::examples {
namespace {

constexpr const char* kOperation = "read_json";
constexpr uintmax_t kMaxBytes = uintmax_t{16} << 20;

[[noreturn]] void refuse_file(const std::string& place, const std::string& what) {
  throw DataError(ErrorDetail{kOperation, "file", place, what});
}

/// Builds the object event by event: nothing is kept that is not checked.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Builder(std::string place) : place_(std::move(place)) {}
  JsonObject take() { return std::move(object_); }

  bool null() override { return number(std::numeric_limits<double>::quiet_NaN()); }
  bool boolean(bool) override { refuse("true and false have no place here"); }
  bool number_integer(number_integer_t value) override { return number(int64_t{value}); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > uint64_t{INT64_MAX}) refuse("a number is above 2^63 - 1");
    return number(static_cast<int64_t>(value));
  }
  bool number_float(number_float_t value, const string_t&) override { return number(value); }
  bool string(string_t& value) override {
    if (!in_array_) {
      add(std::move(value));
    } else {
      if (!numbers_.empty()) refuse("an array mixes numbers and strings");
      texts_.push_back(std::move(value));
    }
    return true;
  }
  bool binary(binary_t&) override { refuse("binary data has no place here"); }
  bool start_object(std::size_t) override {
    if (is_open_) refuse("an object in an object has no place here");
    is_open_ = true;
    return true;
  }
  bool key(string_t& name) override {
    if (!names_.insert(name).second) refuse("a name comes twice");
    name_ = std::move(name);
    return true;
  }
  bool end_object() override { return true; }
  bool start_array(std::size_t) override {
    if (in_array_ || !is_open_) refuse("an array has no place here");
    in_array_ = is_whole_ = true;
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    if (!texts_.empty()) {
      add(std::exchange(texts_, {}));
    } else if (is_whole_) {
      add(std::exchange(integers_, {}));
    } else {
      add(std::exchange(numbers_, {}));
    }
    numbers_.clear();
    integers_.clear();
    return true;
  }
  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::detail::exception& error) override {
    refuse(error.what());
  }

 private:
  template <typename T>
  bool number(T value) {
    if (!in_array_) {
      add(value);
      return true;
    }
    if (!texts_.empty()) refuse("an array mixes numbers and strings");
    numbers_.push_back(static_cast<double>(value));
    if constexpr (std::is_same_v<T, int64_t>) {
      integers_.push_back(value);
    } else {
      is_whole_ = false;
    }
    return true;
  }
  template <typename T>
  void add(T&& value) {
    if (!is_open_) refuse("a line is no object");
    object_.push_back({name_, std::forward<T>(value)});
  }
  [[noreturn]] void refuse(const std::string& what) const { refuse_file(place_, what); }

  std::string place_;
  JsonObject object_;
  std::set<std::string> names_;
  std::string name_;
  bool is_open_ = false;
  bool in_array_ = false;
  bool is_whole_ = true;  // the array has integers only
  std::vector<double> numbers_;
  std::vector<int64_t> integers_;
  std::vector<std::string> texts_;
};

}  // namespace

JsonObject parse_json(const std::string& text, const std::string& place) {
  // The parser would skip a byte order mark and stop at a zero.
  if (text.empty() || text.front() != '{' || text.back() != '}' ||
      text.find('\0') != std::string::npos) {
    refuse_file(place, "is no line with a JSON object");
  }
  Builder builder(place);
  nlohmann::json::sax_parse(text, &builder);
  return builder.take();
}

std::vector<JsonObject> read_json_lines(const std::string& path) {
  std::error_code code;
  if (!std::filesystem::is_regular_file(path, code)) {
    throw IoError(ErrorDetail{kOperation, "file", path,
                              code ? format_text("cannot be opened (%s)", code.message().c_str())
                                   : std::string("is no file")});
  }
  if (std::filesystem::file_size(path, code) > kMaxBytes) {
    refuse_file(path, "is above 16 MiB, more than any run writes");
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::vector<JsonObject> objects;
  std::string line;
  while (std::getline(file, line)) {
    objects.push_back(parse_json(line, path + ":" + std::to_string(objects.size() + 1)));
  }
  if (!file.eof()) {
    throw IoError(ErrorDetail{kOperation, "file", path,
                              format_text("cannot be read (%s)", std::strerror(errno))});
  }
  return objects;
}

JsonFields::JsonFields(const JsonObject& object, std::string place)
    : object_(object), place_(std::move(place)) {}

void JsonFields::refuse(const std::string& name, const std::string& what) const {
  refuse_file(place_, "field \"" + name + "\" " + what);
}

template <typename T>
const T& JsonFields::value(const std::string& name, const char* type) const {
  for (const JsonField& field : object_) {
    if (field.name != name) continue;
    if (const T* found = std::get_if<T>(&field.value)) return *found;
    refuse(name, std::string("is not ") + type);
  }
  refuse(name, "is missing");
}

const std::string& JsonFields::text(const std::string& name) const {
  return value<std::string>(name, "a string");
}

const std::vector<std::string>& JsonFields::texts(const std::string& name) const {
  return value<std::vector<std::string>>(name, "an array of strings");
}

int64_t JsonFields::integer(const std::string& name, int64_t low, int64_t high) const {
  const auto found = value<int64_t>(name, "a whole number");
  if (found < low || found > high) {
    refuse(name, format_text("is %lld, outside %lld to %lld", static_cast<long long>(found),
                             static_cast<long long>(low), static_cast<long long>(high)));
  }
  return found;
}

const std::vector<int64_t>& JsonFields::counts(const std::string& name, size_t size,
                                               int64_t limit) const {
  const auto& found = value<std::vector<int64_t>>(name, "an array of whole numbers");
  if (found.size() != size) {
    refuse(name, format_text("has %zu numbers where %zu belong", found.size(), size));
  }
  for (const int64_t count : found) {
    if (count < 0 || count > limit) {
      refuse(name, format_text("has %lld, outside 0 to %lld", static_cast<long long>(count),
                               static_cast<long long>(limit)));
    }
  }
  return found;
}

}  // namespace perseid::examples
