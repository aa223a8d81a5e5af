#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace perseid {

/// What went wrong, field by field. `what()` of an Error is made from it:
/// `[operation] argument=value limit (rank r, layer l, step s)`; unknown fields are left out.
struct ErrorDetail {
  std::string operation;  ///< the public operation, snake_case: "top_k_gate", "dispatch"
  std::string argument;   ///< the argument or quantity that is wrong; may be empty
  std::string value;      ///< its value as text
  std::string limit;      ///< the rest of the sentence: the limit and the way out, no full stop
  int rank = -1;          ///< rank that speaks; -1 before a group exists
  int culprit = -1;       ///< rank that is at fault, where ranks agreed on one
  int layer = -1;
  int64_t step = -1;
};

/// Base of all exceptions of Perseid. The library throws and never exits; a program maps
/// exit_code() to its own exit status.
class Error : public std::runtime_error {
 public:
  explicit Error(ErrorDetail detail);
  const ErrorDetail& detail() const noexcept { return detail_; }
  virtual int exit_code() const noexcept = 0;

 private:
  ErrorDetail detail_;
};

#define PERSEID_DEFINE_ERROR(Name, code)                     \
  class Name : public Error {                                \
   public:                                                   \
    using Error::Error;                                      \
    int exit_code() const noexcept override { return code; } \
  }
PERSEID_DEFINE_ERROR(ConfigError, 64);    ///< usage or configuration
PERSEID_DEFINE_ERROR(DataError, 65);      ///< bad data
PERSEID_DEFINE_ERROR(InternalError, 70);  ///< a broken invariant of ours; no user input triggers it
PERSEID_DEFINE_ERROR(OutOfMemory, 71);    ///< host or device memory
PERSEID_DEFINE_ERROR(IoError, 74);        ///< input, output or disk full
PERSEID_DEFINE_ERROR(PeerLost, 75);       ///< a rank is gone or too late; a restart may help
PERSEID_DEFINE_ERROR(RanksDisagree, 76);  ///< ranks entered one collective with different arguments
PERSEID_DEFINE_ERROR(Diverged, 79);       ///< NaN, or replicas that should be equal and are not
#undef PERSEID_DEFINE_ERROR

/// Text of a value for ErrorDetail::value.
template <typename T>
std::string to_text(const T& value) {
  // Texts of sizes are also made for checks that hold, in every step: without a stream.
  if constexpr (std::is_integral_v<T> && sizeof(T) >= sizeof(int)) return std::to_string(value);
  std::ostringstream out;
  out << value;
  return out.str();
}

/// Throws ConfigError `[operation] argument=value limit` unless `holds`.
template <typename T>
void require(bool holds, const char* operation, const char* argument, const T& value,
             const std::string& limit) {
  if (!holds) {
    throw ConfigError(ErrorDetail{operation, argument, to_text(value), limit});
  }
}

/// An invariant of Perseid itself. Throws InternalError with file and line unless `condition`.
#define PERSEID_INVARIANT(condition)                                     \
  do {                                                                   \
    if (!(condition)) {                                                  \
      ::perseid::throw_broken_invariant(#condition, __FILE__, __LINE__); \
    }                                                                    \
  } while (false)
[[noreturn]] void throw_broken_invariant(const char* condition, const char* file, int line);

}  // namespace perseid
